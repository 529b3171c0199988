"""A model that is quantized after its training: calibrate, quantize, evaluate beside the original, record."""

import copy
import shutil
import warnings
from collections.abc import Sequence

from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from bitnet.data.datamodule import TextDataModule
from bitnet.data.passages import ids_hash
from bitnet.evaluation import TextProtocol, footprint
from bitnet.experiment.arm import FULL_PRECISION, REFERENCE_RECORD, Arm, refuse_exports
from bitnet.experiment.settings import build
from bitnet.files import atomic_file
from bitnet.ptq import Driver, LayerResult, PTQMethod, quantize
from bitnet.ptq.progress import ConsoleProgress
from bitnet.quant.static import StaticActivation
from bitnet.report import (
    RunRecord,
    layers_markdown,
    layers_picture,
    terminal,
    write_layers_csv,
)

UNFINISHED = "quantized"  # finished blocks of a quantization that goes on, in the run's folder


def quantize_afterwards(arm: Arm, model: PreTrainedModel) -> list[RunRecord]:
    """Quantize ``model`` as the configuration says; returns the original's record and the quantized model's.

    The run's folder gets ``layers.csv``, ``layers.md`` and ``layers.png`` beside the records. A run that was stopped
    goes on after its last finished block.
    """
    cfg, directory = arm.cfg, arm.directory
    method: PTQMethod = build(cfg.ptq)
    driver: Driver = build(cfg.driver)
    activation = build(cfg.activation) if cfg.activation else None
    needed = bool(method.requires) or isinstance(activation, StaticActivation) or driver.smoothquant is not None
    windows = calibration_windows(cfg, arm.data) if needed or driver.layer_errors else None
    arm.measure.prepare()
    beside = isinstance(arm.measure.protocol, TextProtocol) and arm.measure.protocol.compare
    original = copy.deepcopy(model) if beside else None
    before = None if beside else arm.record(FULL_PRECISION, model, arm.measure(model)[-1])
    results = quantize(
        model,
        method,
        windows,
        activation=activation,
        driver=driver,
        directory=directory / UNFINISHED,
        progress=ConsoleProgress(terminal()),
    )
    refuse_exports(cfg, model, arm.data)
    _tell_damping(cfg, results)
    _write_layers(arm, results)
    figures = arm.measure(model, original)
    if before is None:
        assert original is not None
        before = arm.record(FULL_PRECISION, original, figures[0])
    before.write(directory / REFERENCE_RECORD)
    calibration = None
    seconds = sum(layer.seconds for layer in results)
    if needed and windows is not None:  # else the text was looked at for the layers' errors alone
        calibration = {**_plain(cfg.calibration), "hash": ids_hash(windows)}
        seconds += sum(layer.calibration_seconds for layer in results)
    after = arm.record(
        cfg.method,
        model,
        figures[-1],
        claimed_bits=method.claimed_bits,
        quantized_share=footprint(model).quantized_share,
        quantize_seconds=seconds,
        calibration=calibration,
    )
    arm.export(model, after)
    arm.keep(after)
    shutil.rmtree(directory / UNFINISHED)
    return [before, after]


def calibration_windows(cfg: DictConfig, data: TextDataModule) -> Tensor:
    """Token ids [windows, tokens] of the text that ``calibration`` in the configuration chooses."""
    chosen = cfg.calibration
    window = chosen.window or cfg.data.block_size
    return data.calibration_windows(chosen.windows, window, documents=chosen.documents, seed=chosen.seed)


def _write_layers(arm: Arm, results: Sequence[LayerResult]) -> None:
    write_layers_csv(results, arm.directory / "layers.csv")
    layers_picture(results, arm.directory / "layers.png", title=f"{arm.cfg.method}: error of each layer")
    with atomic_file(arm.directory / "layers.md") as partial:
        partial.write_text(layers_markdown(results), encoding="utf-8")


def _tell_damping(cfg: DictConfig, results: Sequence[LayerResult]) -> None:
    """Warn of layers whose Hessian needed more damping than was asked for."""
    asked = cfg.ptq.get("damping")
    raised = [each for each in results if asked is not None and each.damping is not None and each.damping > asked]
    if raised:
        warnings.warn(
            f"{len(raised)} layers needed more damping than {asked} (up to "
            f"{max(each.damping or 0 for each in raised)}), {raised[0].name} first: their inputs hardly vary; more "
            "calibration text may help",
            stacklevel=2,
        )


def _plain(node: DictConfig) -> dict[str, object]:
    return {str(key): node[key] for key in node}
