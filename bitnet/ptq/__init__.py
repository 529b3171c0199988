"""Post-training quantization: methods, and the driver that takes them through a model block by block."""

from bitnet.ptq.protocol import LayerStats, PTQMethod, Statistic

__all__ = ["LayerStats", "PTQMethod", "Statistic"]
