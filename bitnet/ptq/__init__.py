"""Post-training quantization: methods, and the driver that takes them through a model block by block."""

from bitnet.ptq.driver import Driver, LayerResult, quantize
from bitnet.ptq.gptq import GPTQ
from bitnet.ptq.protocol import LayerStats, PTQMethod, Statistic
from bitnet.ptq.rtn import RoundToNearest

__all__ = ["GPTQ", "Driver", "LayerResult", "LayerStats", "PTQMethod", "RoundToNearest", "Statistic", "quantize"]
