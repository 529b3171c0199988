"""Where the training of a pretrained model starts: latent weights set before the first step, as ``init`` says."""

import time
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from bitnet.data.datamodule import TextDataModule
from bitnet.errors import InputError
from bitnet.experiment.post_training import calibration_windows
from bitnet.experiment.settings import build
from bitnet.ptq import initialise
from bitnet.ptq.progress import ConsoleProgress
from bitnet.ptq.starts import Start
from bitnet.quant.layer_grid import LayerGrid
from bitnet.report import terminal

TURNED = "bitnet.quant.RotatedInputs"


def check_init(cfg: DictConfig) -> None:
    """Raise InputError for an initialisation of what is not pretrained, not quantized, or quantized in another way."""
    if not cfg.get("init"):
        return
    if cfg.model.path is None:
        raise InputError("init= starts from the weights of a pretrained model: give model.path=DIR, or leave out init=")
    if cfg.model.get("layer") is None:
        raise InputError(
            f"init= sets the weights of layers that are quantized in training, and model={cfg.method} has none: choose "
            "model=bitnet158, or ptq= to quantize afterwards"
        )
    if cfg.activation and cfg.activation.get("_target_") == TURNED:
        raise InputError("init= knows weights whose inputs are not turned: take activation=a4, or init=none")
    build(cfg.init)  # refuses options that do not fit, before any work
    LayerGrid.of(build(cfg.quantizer))


def start_from(cfg: DictConfig, checkpoint: Path, data: TextDataModule, model: nn.Module) -> None:
    """Set the latent weights of ``model`` as the configuration says; nothing where ``checkpoint`` will replace them."""
    if not cfg.get("init") or (checkpoint.exists() and not cfg.get("lora")):  # adapters' checkpoints lack their base
        return
    console, began = terminal(), time.perf_counter()
    start: Start = build(cfg.init)
    windows = calibration_windows(cfg, data) if start.requires else None
    console.print(f"The weights to start from ({type(start).__name__}):")
    results = initialise(model, start, windows, progress=ConsoleProgress(console))
    console.print(f"{len(results)} layers in {time.perf_counter() - began:.0f} s")
