"""A causal language model from a Hugging Face directory, in float32, its linears dense."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from bitnet.errors import InputError
from bitnet.models.empty import COUNTS
from bitnet.models.generation_config import read_generation


def from_directory(path: str | Path) -> PreTrainedModel:
    """Load config and safetensors of a local directory; nothing is downloaded.

    A directory that `bitnet.export` wrote with latent weights (``quantization_mode: online``) gives these weights,
    dense: convert the model to train or to evaluate it in 1.58 bits.

    Raises:
        InputError: no such directory, no config in it, weights that are missing, left over or not finite, or a
            checkpoint whose weights are quantized already.
    """
    path = Path(path)
    config = config_of(path)
    _refuse_quantized(path, config.get("quantization_config"))
    _refuse_more_layers(path, config)
    generation = read_generation(path)  # transformers ignores a damaged one
    with _causal_lm(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=_config(path), dtype=torch.float32, output_loading_info=True, **LOCAL
        )
        model, report = loaded
    model.generation_config = generation or model.generation_config
    _refuse_incomplete(path, report)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{path}: {name} has values that are not finite: the checkpoint is damaged or diverged")
    return model


def config_of(path: str | Path) -> dict[str, Any]:
    """config.json of a directory as it stands there.

    Raises:
        InputError: no such directory, or its config (or the ``quantization_config`` in it) is no json object.
    """
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        raise InputError(f"model.path must be a Hugging Face directory with a config.json, got {path}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{config_file} is no json: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config"), dict | None):
        raise InputError(f"{config_file} must hold a json object, and its quantization_config, if any, another")
    return config


def holds_latent_weights(path: str | Path) -> bool:
    """Whether a directory is of a model that is quantized as it is used: its weights say little unquantized."""
    entry = config_of(path).get("quantization_config")
    return entry is not None and _is_latent(entry)


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of the weights in the files of a directory, as its config says; float32 where it says none."""
    config = config_of(path)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{path}/config.json names the dtype {name!r}, which torch does not have")
    return dtype


LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # no network, no code of a directory


def _config(path: Path) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(path, **LOCAL)
    vars(config).pop("quantization_config", None)
    return config


@contextmanager
def _causal_lm(path: Path) -> Iterator[None]:
    """What transformers raises for a directory that it cannot use, as InputError."""
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # a value that does not fit can fail anywhere inside transformers, in any way
        raise InputError(f"{path} does not load as a causal language model: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What ``error`` says in its first line; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _refuse_more_layers(path: Path, config: dict[str, Any]) -> None:
    """A damaged number of layers would build until memory ends. Every layer has a tensor in the files at least."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        return
    tensors = 0
    for each in files:
        try:
            with safe_open(each, framework="pt") as file:
                tensors += len(file.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} does not load as a causal language model: {each.name} is no whole safetensors file: "
                f"{first_line(error)}"
            ) from error
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, dict) else {}):
        for key in COUNTS:
            count = values.get(key, 0)
            if type(count) is not int or not 0 <= count <= tensors:
                raise InputError(f"{path}/config.json: {key} is {count!r}, and the files hold {tensors} tensors in all")


def _is_latent(entry: dict[str, Any]) -> bool:
    return entry.get("quant_method") == "bitnet" and entry.get("quantization_mode") == "online"


def _refuse_quantized(path: Path, entry: dict[str, Any] | None) -> None:
    if entry is not None and not _is_latent(entry):
        method = entry.get("quant_method", "unknown")
        raise InputError(
            f"{path} holds weights quantized with {method!r}, which cannot be trained or quantized again: give the "
            "full-precision checkpoint instead. To evaluate or convert it as it is, read it with bitnet.export.load"
        )


def _refuse_incomplete(path: Path, report: dict[str, Any]) -> None:
    for problem, what in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has tensors that the model has no place for:"),
        ("mismatched_keys", "has tensors of another shape than its config says:"),
    ):
        keys = sorted(str(key) for key in report.get(problem, ()))
        if keys:
            raise InputError(f"{path} {what} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}")
