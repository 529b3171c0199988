"""Which settings of a run go with adapters, and with blocks that are computed again."""

from omegaconf import DictConfig

from bitnet.errors import InputError


def check_lora(cfg: DictConfig, trained_quantized: bool) -> None:
    """Raise InputError for adapters on what is not quantized, not trained, or random."""
    if not trained_quantized:
        raise InputError(
            f"model={cfg.method} quantizes nothing in training: lora= goes with model=bitnet158 or bitnet1"
        )
    if cfg.model.path is None:
        raise InputError(
            "lora= adapts a pretrained model: give model.path=DIR; random weights have to be trained in full, lora=none"
        )
    if not cfg.fit:
        raise InputError("lora= is a part of training: it does not go with fit=false")
    if cfg.twin:
        raise InputError("twin=dense trains all weights, and lora= does not: run model=dense by itself")


def check_checkpointing(cfg: DictConfig) -> None:
    """Raise InputError for gradient checkpointing without a training, or in a compiled model."""
    if not cfg.model.get("gradient_checkpointing"):
        return
    if not cfg.fit:
        raise InputError("model.gradient_checkpointing=true is a part of training: it does not go with fit=false")
    if cfg.compile:
        raise InputError(
            "model.gradient_checkpointing=true goes with compile=false: it is not built for compiled models"
        )
