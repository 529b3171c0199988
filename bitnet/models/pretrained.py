"""A causal language model from a Hugging Face directory, in float32, its linears dense."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitnet.errors import InputError


def from_directory(path: str | Path) -> PreTrainedModel:
    """Load config and safetensors of a local directory; nothing is downloaded.

    A directory that `bitnet.export` wrote with latent weights (``quantization_mode: online``) gives these weights,
    dense: convert the model to train or to evaluate it in 1.58 bits.

    Raises:
        InputError: no such directory, no config in it, weights that are missing, left over or not finite, or a
            checkpoint whose weights are quantized already.
    """
    path = Path(path)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise InputError(f"model.path must be a Hugging Face directory with a config.json, got {path}")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        _refuse_quantized(path, vars(config).pop("quantization_config", None))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        model, report = loaded
    except (OSError, RuntimeError, KeyError, ValueError, AttributeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} does not load as a causal language model: {str(error).splitlines()[0]}") from error
    _refuse_incomplete(path, report)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{path}: {name} has values that are not finite: the checkpoint is damaged or diverged")
    return model


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of the weights in the files of a directory, as its config says; float32 where it says none."""
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{path}/config.json names the dtype {name!r}, which torch does not have")
    return dtype


def _refuse_quantized(path: Path, entry: dict[str, Any] | None) -> None:
    latent = entry is not None and entry.get("quant_method") == "bitnet" and entry.get("quantization_mode") == "online"
    if entry is not None and not latent:
        method = entry.get("quant_method", "unknown")
        raise InputError(f"{path} holds weights quantized with {method!r}: give the full-precision checkpoint instead")


def _refuse_incomplete(path: Path, report: dict[str, Any]) -> None:
    for problem, what in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has tensors that the model has no place for:"),
        ("mismatched_keys", "has tensors of another shape than its config says:"),
    ):
        keys = sorted(str(key) for key in report.get(problem, ()))
        if keys:
            raise InputError(f"{path} {what} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}")
