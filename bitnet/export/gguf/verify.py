"""The gate of a GGUF file: codes, values, tokenizer and logits as read back, and llama.cpp's where it is there."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export.gguf import llama_cpp
from bitnet.export.gguf.architecture import deinterleave
from bitnet.export.gguf.reader import GGUFFile, build
from bitnet.export.gguf.reference import in_float64
from bitnet.export.gguf.tokenizer import read_tokenizer, same_templates, same_tokens
from bitnet.export.gguf.weights import meant
from bitnet.export.parity import (
    SAME_ARITHMETIC,
    compare_logits,
    dense_tensors,
    difference,
    logits,
    quantized_layers,
    same_weight,
    token_ids,
    weight_of,
)
from bitnet.export.protocol import ExportError
from bitnet.models.generation_config import generation_entry
from bitnet.quant import QuantizedWeight
from bitnet.quant.ggml import GGMLWeight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUNDED = 0.25  # allowed for logits where the user chose to round scales or embeddings
# Of llama.cpp from the reference that models its arithmetic: 1e-7 until the first input is rounded the other way (see
# `bitnet.export.gguf.reference`), 0.02 after some have been; rows of q and k in the wrong order make 0.5 and more.
RUNTIME = 0.1


def verify(
    path: Path,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase | None",
    stored_dense: Callable[[str], Tensor | GGMLWeight],
    scale: str,
) -> dict[str, Any]:
    """Read ``path`` and compare it with ``model``; return the figures of `Exported`.

    One layer at a time is in memory beside the model: the codes stay in the mapped file.

    Raises:
        ExportError: anything is not as it was meant.
    """
    config: Any = model.config
    try:
        file = GGUFFile(path)
        layers = _compare_weights(file, model, scale)
        exact = _compare_dense(file, model, stored_dense) and scale == "tensor"
        if tokenizer is not None:
            _compare_tokenizer(tokenizer, read_tokenizer(file.container), path)
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        if generation_entry(file.empty) != generation_entry(model):
            raise ExportError(f"other generation settings are read back from {path} than were written")
        found = build(file, next((each.dtype for _, each in dense_tensors(model)), dtype), mapped=True)
    except InputError as error:
        raise ExportError(f"what was written does not read back: {error}") from error
    found.set_attn_implementation(config._attn_implementation)
    ids = token_ids(model)  # pyright: ignore[reportArgumentType]  # a transformers body, as its architecture says
    nn.Module.to(found, ids.device)
    answer = logits(found, ids)
    distance = compare_logits(logits(model, ids), answer, SAME_ARITHMETIC if exact else ROUNDED, "by this package")
    figures: dict[str, Any] = {"layers": layers, "difference": distance}
    if llama_cpp.computes(file):
        expected = logits(in_float64(GGUFFile(path)), ids.cpu())
        computed = llama_cpp.logits(path, ids.cpu())
        compare_logits(expected, computed, RUNTIME, f"by {llama_cpp.version()}")
        figures |= {
            "runtime": llama_cpp.version(),
            "runtime_difference": difference(logits(model, ids).cpu(), computed),
        }
    return figures


def _compare_tokenizer(written: "PreTrainedTokenizerBase", found: "PreTrainedTokenizerBase | None", path: Path) -> None:
    if not same_tokens(written, found):
        raise ExportError(f"the tokenizer read back from {path} splits a text differently")
    if not same_templates(written, found):
        raise ExportError(f"the tokenizer read back from {path} has other chat templates than were written")


def _compare_weights(file: GGUFFile, model: nn.Module, scale: str) -> int:
    expected = quantized_layers(model)
    for name, layer in expected.items():
        read = file.weight(name)
        if isinstance(read, Tensor) or not _equal(meant(weight_of(layer), scale), read):
            raise ExportError(f"{name}: the codes or scales read back are not those that were written")
    return len(expected)


def _equal(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    if same_weight(one, other):
        return True
    return one.shape == other.shape and torch.equal(one.dequantize().cpu(), other.dequantize())


def _compare_dense(file: GGUFFile, model: nn.Module, stored_dense: Callable[[str], Tensor | GGMLWeight]) -> bool:
    """Whether every dense value is the model's own; ExportError where one is not what was meant."""
    exact = True
    for name, tensor in dense_tensors(model):
        if name == "lm_head.weight" and file.config.tie_word_embeddings:
            continue
        intended = stored_dense(name)
        if isinstance(intended, GGMLWeight):
            read = file.weight(name.removesuffix(".weight"))
            same = not isinstance(read, Tensor) and same_weight(intended, read)
            exact = False
        else:
            read = file.dense(name)
            same = torch.equal(read, deinterleave(intended, file.architecture.heads(name, file.config)))
            exact = exact and torch.equal(read.to(tensor.dtype), tensor.detach().cpu())
        if not same:
            raise ExportError(f"{name} reads back with other values than were written")
    return exact
