"""Refuse a configuration that cannot be run, in one line, before any work; find the folder that the run writes to.

Hydra refuses a key that the configuration does not have, but ``+model.extra=3`` adds one, and it knows nothing of
combinations. Here every key beside a ``_target_`` must be a parameter of what it names.
"""

import inspect
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf

from bitnet.errors import InputError
from bitnet.experiment.adapters import check_checkpointing, check_lora
from bitnet.experiment.cells import RUN, SETTINGS, refuse_other_settings, sweep_cell
from bitnet.experiment.explain import hint
from bitnet.files import atomic_file
from bitnet.quant import in_eight_bits

STATIC = "bitnet.quant.StaticActivation"
ROTATED = "bitnet.quant.RotatedInputs"
CLAIMED = "BITNET_RUN_FOLDER"  # environment variable that tells it to the processes that a run starts
GROUPS = {
    "size",
    "quantizer",
    "activation",
    "model",
    "data",
    "optim",
    "init",
    "lora",
    "distill",
    "schedule",
    "warmup",
    "trainer",
    "callbacks",
    "logger",
    "ptq",
    "calibration",
    "driver",
    "evaluation",
    "export",
}
VALUES = {
    "method",
    "seed",
    "cache_dir",
    "output_dir",
    "resume",
    "fit",
    "dry_run",
    "twin",
    "twin_lr",
    "compile",
    "threads",
}
CALIBRATION = ("windows", "window", "documents", "seed")
POSITIVE_NUMBERS = (
    *(f"trainer.{key}" for key in ("max_steps", "val_check_interval", "accumulate_grad_batches")),
    *(f"data.{key}" for key in ("block_size", "batch_size", "validation_blocks", "tokenizer.vocab_size")),
    *(f"calibration.{key}" for key in CALIBRATION[:3]),
    "threads",
)
AS_DENSE = {"packed": {}, "hf": {"weights": "auto"}}  # formats that carry a dense twin as well, and how
SWITCHES = ("fit", "dry_run", "compile")
INSTANTIATE_KEYS = frozenset({"_target_", "_partial_", "_args_", "_recursive_", "_convert_"})


def check(cfg: DictConfig) -> None:
    """Raise InputError for an unknown key or settings that contradict each other."""
    _known("", set(map(str, cfg)), GROUPS | VALUES)
    if cfg.model.path is None and not cfg.size:
        raise InputError(f"model={cfg.method} reads a pretrained model: give model.path=DIR")
    for path, node in _constructor_calls(cfg, ""):
        _check_keys(path, node)
    _known("calibration.", set(map(str, cfg.calibration)), CALIBRATION)
    trained_quantized = cfg.model.get("layer") is not None
    if cfg.ptq and (trained_quantized or cfg.quantizer):
        raise InputError(
            f"ptq={cfg.method} quantizes a full-precision model after its training: choose model=hf or model=dense, "
            "and leave out quantizer="
        )
    if not trained_quantized and not cfg.ptq and (cfg.quantizer or cfg.activation):
        raise InputError(
            f"model={cfg.method} quantizes nothing: leave out quantizer= and activation=, or choose a model or ptq="
        )
    if cfg.activation and cfg.activation.get("_target_") == STATIC and not cfg.ptq:
        raise InputError("activation=static is calibrated after the training: it goes with ptq=")
    if cfg.activation and cfg.activation.get("_target_") == ROTATED and cfg.ptq:
        raise InputError("activation=a4_rotated turns weights as well, which training begins with: take activation=a4")
    if trained_quantized and not cfg.quantizer:
        raise InputError(f"model={cfg.method} needs a quantizer: model=dense quantizes nothing")
    if cfg.get("lora"):
        check_lora(cfg, trained_quantized)
        build(cfg.lora)  # refuses values that are out of range, before any work
    check_checkpointing(cfg)
    if cfg.get("distill") and not cfg.fit:
        raise InputError("distill= is a part of training: it does not go with fit=false")
    if cfg.get("distill") and cfg.distill.get("teacher") is None:
        raise InputError(
            "distill= needs a teacher: give distill.teacher=DIR, or model.path=DIR for what it starts from"
        )
    for term in ("logits", "hidden", "relations"):
        if (cfg.get("distill") or {}).get(term):
            build(cfg.distill[term])  # refuses values, before any work
    if cfg.model.get("subln") and cfg.model.path is None:
        raise InputError("model.subln=true goes into a pretrained model: give model.path=DIR, or model.body=bitnet")
    if cfg.twin_lr is not None and not cfg.twin:
        raise InputError("twin_lr is the learning rate of the twin: add twin=dense, or set optim.lr")
    _check_scalars(cfg)
    if cfg.get("warmup"):
        _check_warmup(cfg, trained_quantized)
    for group in ("quantizer", "activation", "ptq", "driver", "evaluation"):
        if cfg[group]:
            build(cfg[group])  # refuses options that do not fit, before any work
    build_all(cfg.export)
    if str(cfg.trainer.precision).startswith("16"):
        raise InputError(f"trainer.precision={cfg.trainer.precision} needs a loss scaler: use bf16-mixed, or 32-true")
    if cfg.trainer.accelerator == "mps":
        raise InputError("trainer.accelerator=mps has no float64, which losses and scales are summed in: use cpu")
    if cfg.twin not in (None, "dense"):
        raise InputError(f"twin must be null or dense, got {cfg.twin!r}")
    if cfg.twin and cfg.model.get("layer") is None:
        raise InputError(f"twin=dense goes with a quantized model, got model={cfg.method}, which is dense itself")
    if cfg.twin and not cfg.fit:
        raise InputError("twin=dense trains a twin: it does not go with fit=false")
    if not cfg.fit and cfg.model.path is None:
        raise InputError("fit=false evaluates a trained model: give model.path=DIR")
    longest = cfg.size.get("max_position_embeddings", math.inf)
    if cfg.model.path is None and cfg.data.block_size > longest:
        raise InputError(f"data.block_size={cfg.data.block_size} exceeds size.max_position_embeddings={longest}")


def _check_warmup(cfg: DictConfig, trained_quantized: bool) -> None:
    """Raise InputError for a warm-up of what is not quantized or not trained, or one that is longer than the run."""
    if not trained_quantized:
        raise InputError(f"model={cfg.method} quantizes nothing in training: leave out warmup=")
    if not cfg.fit:
        raise InputError("warmup= is a part of training: it does not go with fit=false")
    warmup = build(cfg.warmup)
    warmup.check(cfg.trainer.max_steps)
    if warmup.narrow is not None:
        activation = build(cfg.activation) if cfg.activation else None
        in_eight_bits(getattr(activation, "plain", activation))


def _check_scalars(cfg: DictConfig) -> None:
    """Raise InputError for a value that is none of the kind its key takes."""
    for key in POSITIVE_NUMBERS:
        value = OmegaConf.select(cfg, key)
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{key} must be a positive whole number, got {value!r}")
    if type(cfg.calibration.seed) is not int:
        raise InputError(f"calibration.seed must be a whole number, got {cfg.calibration.seed!r}")
    for key in SWITCHES:
        if not isinstance(cfg[key], bool):
            raise InputError(f"{key} must be true or false, got {cfg[key]!r}")
    for group in ("callbacks", "logger"):
        for name, node in (cfg[group] or {}).items():
            if node is not None and not isinstance(node, DictConfig):
                raise InputError(f"{group}.{name} is switched off with null and set by its own keys, got {node!r}")


def build(node: DictConfig, **arguments: Any) -> Any:
    """Call what ``node`` names. A constructor's `InputError` comes through as it is, without Hydra's wrapping."""
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError | ValueError):
            raise InputError(f"{node._target_} cannot be made from {plain_node(node)}: {error.__cause__}") from error
        raise


def build_model(cfg: DictConfig, **arguments: Any) -> Any:
    """The model of a run. ``activation=none`` is an empty group in the configuration, and None to a layer."""
    if cfg.model.get("layer") is not None and not cfg.activation:
        cfg = cfg.copy()
        OmegaConf.update(cfg, "model.layer.activation", None)
    return build(cfg.model, **arguments)


def plain_node(node: DictConfig) -> dict[str, Any]:
    """The values of ``node`` beside its ``_target_``."""
    return {str(key): node[key] for key in node if key not in INSTANTIATE_KEYS}


def build_all(nodes: DictConfig | None) -> dict[str, Any]:
    """`build` each entry of a group that is a collection; one that is null is switched off."""
    return {str(name): build(node) for name, node in (nodes or {}).items() if node is not None}


def twin_of(cfg: DictConfig) -> DictConfig:
    """The same run in full precision: nothing quantized, and its own learning rate where one is given."""
    twin = cfg.copy()
    OmegaConf.update(twin, "method", "dense")
    OmegaConf.update(twin, "twin", None)
    OmegaConf.update(twin, "model.layer", None)
    twin.quantizer, twin.activation, twin.init, twin.distill, twin.warmup = {}, {}, {}, {}, {}
    twin.export = {name: {**node, **AS_DENSE[name]} for name, node in (cfg.export or {}).items() if name in AS_DENSE}
    if cfg.twin_lr is not None:
        OmegaConf.update(twin, "optim.lr", cfg.twin_lr)
    return twin


def claim_directory(cfg: DictConfig) -> Path:
    """Make the run's folder, with the settings in it; a folder is claimed by one run only.

    In a sweep the folder is the cell's, and a run that is there already goes on. Of a run's several processes the first
    one makes the folder. Those that it starts learn the name from it; those that a launcher such as torchrun starts
    have to be given one.

    Raises:
        InputError: ``output_dir`` exists already, or is missing where a launcher starts the processes; the cell of a
            sweep was started with other settings.
    """
    if process_rank() != 0:
        if (name := os.environ.get(CLAIMED, cfg.output_dir)) is None:
            raise InputError("several processes of one run need output_dir=... to agree on its folder")
        return Path(name)
    directory = _claimed(cfg)
    os.environ[CLAIMED] = str(directory)
    settings = cfg.copy()
    OmegaConf.update(settings, "output_dir", str(directory))
    with atomic_file(directory / SETTINGS) as partial:
        OmegaConf.save(settings, partial)
    return directory


def process_rank() -> int:
    """This process among those of the run; 0 for the first, which writes."""
    return rank_zero_only.rank  # pyright: ignore[reportFunctionMemberAccess]  # Lightning keeps it there


def _claimed(cfg: DictConfig) -> Path:
    if cfg.output_dir is not None:
        directory = Path(cfg.output_dir)
        if directory.exists():
            raise InputError(f"{directory} exists already: choose a new output_dir, or go on with resume={directory}")
        directory.mkdir(parents=True)
        return directory
    if (cell := sweep_cell()) is not None:
        refuse_other_settings(cell / RUN, cfg)
        (cell / RUN).mkdir(parents=True, exist_ok=True)
        return cell / RUN
    return _new_directory(Path("runs") / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{cfg.method}")


def discard_if_unused(directory: Path) -> None:
    """Remove a claimed folder that holds nothing but its settings: the run was refused before it began."""
    if {path.name for path in directory.rglob("*") if path.is_file()} <= {SETTINGS, "hparams.yaml"}:  # Lightning's copy
        shutil.rmtree(directory)


def resumed(cfg: DictConfig) -> DictConfig:
    """The settings that the run in ``cfg.resume`` was started with. Only ``threads`` and ``export`` may be given anew.

    Raises:
        InputError: no run is there, or the command line gives settings of its own.
    """
    directory = Path(cfg.resume)
    if not (directory / SETTINGS).is_file():
        raise InputError(f"resume must be a run's folder (one with a {SETTINGS} in it), got {directory}")
    exports = [each for each in _overrides() if each.split("=")[0].split(".")[0] == "export"]
    free = ("resume", "threads")
    others = [each for each in _overrides() if each.split("=")[0] not in free and each not in exports]
    if others:
        raise InputError(
            f"resume goes on with the run's own settings, so {' '.join(others)} has no meaning: leave it out"
        )
    settings = OmegaConf.load(directory / SETTINGS)
    assert isinstance(settings, DictConfig)
    OmegaConf.update(settings, "resume", str(directory))
    if exports:
        settings.export = cfg.export
    if cfg.threads is not None:
        OmegaConf.update(settings, "threads", cfg.threads)
    return settings


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as a plain dict, every interpolation resolved."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def _overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _new_directory(wanted: Path) -> Path:
    """``wanted``, or the first of ``wanted-2``, ``wanted-3``, ... that no other run has made in the same second."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        directory = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            directory.mkdir()
        except FileExistsError:
            number += 1
        else:
            return directory


def _constructor_calls(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Every ``_target_`` node at or below ``node``, with its dotted path."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            yield from _constructor_calls(node[key], f"{path}.{key}" if path else str(key))
    elif isinstance(node, ListConfig):
        for index, each in enumerate(node):
            yield from _constructor_calls(each, f"{path}.{index}")


def _check_keys(path: str, node: DictConfig) -> None:
    parameters = inspect.signature(get_object(node._target_)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    _known(f"{path}.", set(map(str, node)) - INSTANTIATE_KEYS, parameters)
    for name, parameter in parameters.items():
        if parameter.annotation is bool and name in node and not isinstance(node[name], bool):
            raise InputError(f"{path}.{name} must be true or false, got {node[name]!r}")


def _known(prefix: str, keys: set[str], allowed: Any) -> None:
    for key in sorted(keys - set(allowed)):
        raise InputError(f"unknown key {prefix}{key}{hint(key, allowed, prefix)}")


def command() -> str:
    """The command line of this process, as it was typed."""
    return shlex.join(["python", *sys.argv]) if sys.argv[0].endswith(".py") else shlex.join(sys.argv)
