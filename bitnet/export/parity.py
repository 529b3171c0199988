"""The gate that every export passes: what was read back has the same codes and answers with the same logits."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitnet.errors import InputError
from bitnet.export.protocol import ExportError
from bitnet.nn import BitLinear, QuantizedModule, bit_linears
from bitnet.quant import PackedTensor, QTensor, QuantizedWeight, Rotated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAME_ARITHMETIC = 1e-4  # the same layers in the same order: 0 was measured; a kernel may still sum in another order


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer with codes, by name: trained (`BitLinear`), frozen or packed."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BitLinear | QuantizedModule)}


def weight_of(layer: nn.Module) -> QuantizedWeight:
    """The quantized weight of such a layer, unpacked where it is packed: codes are compared as codes."""
    assert isinstance(layer, BitLinear | QuantizedModule)
    weight = layer.quantized_weight() if isinstance(layer, BitLinear) else layer.weight
    return weight.unpack() if isinstance(weight, PackedTensor) else weight


def plain_values(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a dense layer in the place of such a layer: values of the codes, for inputs that nobody turns."""
    weight, activation = weight_of(layer), getattr(layer, "activation", None)
    if not isinstance(activation, Rotated):
        return weight.dequantize(dtype)
    return activation.rotate(weight.dequantize()).to(dtype)


def warm_up_problems(model: nn.Module) -> list[str]:
    """That ``model`` was stopped in the warm-up of its quantization, if it was."""
    names = [name for name, layer in bit_linears(model) if layer.warming_up]
    if not names:
        return []
    which = f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
    return [
        f"the quantization of {which} is still being warmed up, so the codes are not yet what the layer computes with: "
        "train to the end of the warm-up"
    ]


def dense_tensors(model: nn.Module, layers: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every saved tensor that belongs to no quantized weight, by name: embeddings, norms, head, biases.

    ``layers`` names those layers instead, where ``model`` is the plain body of a quantized one.
    """
    quantized = tuple(f"{name}." for name in (quantized_layers(model) if layers is None else layers))
    for name, tensor in model.state_dict().items():
        if not name.startswith(quantized) or name.endswith(".bias"):
            yield name, tensor


def refuse_non_finite(model: nn.Module) -> None:
    """Raise InputError naming the first tensor of ``model`` that holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{name} holds NaN or infinity: the training diverged; export its last good checkpoint instead"
            )


def compare_codes(written: nn.Module, found: nn.Module, *, beside: Collection[str] = ()) -> int:
    """Compare every quantized weight, one layer at a time; return their number.

    ``beside`` names layers of ``found`` that only the export itself quantized.

    Raises:
        ExportError: a layer is missing, left over, or its codes, scales or zero points are not equal.
    """
    expected, read = quantized_layers(written), quantized_layers(found)
    if names := sorted(expected.keys() ^ (read.keys() - set(beside))):
        raise ExportError(f"other layers are quantized in what was read back: {', '.join(names[:3])}")
    for name, layer in expected.items():
        if not same_weight(weight_of(layer), weight_of(read[name])):
            raise ExportError(f"{name}: the codes or scales read back are not those that were written")
    return len(expected)


def same_weight(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether two quantized weights stand for the same values; codes and scales are compared where both have them."""
    if isinstance(one, QTensor) and isinstance(other, QTensor):
        zero = one.zero_point is None if other.zero_point is None else _equal(one.zero_point, other.zero_point)
        return zero and torch.equal(one.qdata, other.qdata) and _equal(one.scale.float(), other.scale.float())
    if type(one) is type(other):
        return all(_same(getattr(one, each.name), getattr(other, each.name)) for each in fields(one))  # pyright: ignore
    return one.shape == other.shape and torch.equal(one.dequantize(), other.dequantize())


def token_ids(model: "PreTrainedModel") -> Tensor:
    """Two rows of random tokens, the same ones every time: [2, up to 32]."""
    config: Any = model.config.get_text_config()
    length = min(32, getattr(config, "max_position_embeddings", 32))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, length), generator=generator).to(model.device)


def rotary_tables(model: nn.Module) -> dict[str, Tensor]:
    """The tables of rotary frequencies, by name: no file keeps them, and every reader computes them in float32."""
    return {name: each for name, each in model.named_buffers() if name.endswith("inv_freq")}


def rotary_problems(model: nn.Module) -> list[str]:
    """Why a reader's rotary tables would not be those of ``model``: none where they are in float32 or better."""
    tables = rotary_tables(model)
    if all(each.dtype in (torch.float32, torch.float64) for each in tables.values()):
        return []
    return [
        "the table of rotary frequencies was rounded to 16 bits (model.bfloat16() does that), and readers compute it "
        "in float32: load or build the model in that dtype instead (from_pretrained(..., dtype=...))"
    ]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
    """Float32 logits in evaluation mode; ``model`` is as before afterwards, each module in the mode it was in.

    ``values`` stand in for parameters and buffers of these names.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return functional_call(model, dict(values or {}), (), {"input_ids": ids}).logits.float()
    finally:
        for module, flag in training.items():
            module.training = flag


def difference(expected: Tensor, found: Tensor) -> float:
    """Root mean square of ``found - expected`` as a share of the spread of ``expected`` over the vocabulary."""
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((found - expected).square().mean().sqrt() / spread.clamp(min=1e-30))


def compare_logits(expected: Tensor, found: Tensor, tolerance: float, how: str) -> float:
    """The `difference`.

    Raises:
        ExportError: it exceeds ``tolerance``, or is NaN; ``how`` says what computed ``found``.
    """
    distance = difference(expected, found)
    if not distance <= tolerance:
        raise ExportError(
            f"what was written, read back {how}, gives other logits: they differ by {distance:.1e} of their spread, "
            f"{tolerance:.1e} is allowed"
        )
    return distance


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file())


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return (
        one is not None
        and other is not None
        and one.numel() == other.numel()
        and torch.equal(one.flatten(), other.flatten())
    )
