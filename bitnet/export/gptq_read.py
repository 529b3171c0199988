"""Reading a GPTQ checkpoint, whoever wrote it: every packed layer becomes a `bitnet.nn.QuantizedLinear`, exactly."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitnet.errors import InputError
from bitnet.export.gptq_layout import BITS, BLOCK, FORMATS, GPTQTensors, from_tensors
from bitnet.export.hf_read import Tensors, read_with
from bitnet.nn import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read_gptq(path: Path, entry: dict[str, Any]) -> "PreTrainedModel":
    """The model of a folder with ``quant_method: gptq``; ``entry`` is its ``quantization_config``.

    Raises:
        InputError: settings that are none of the format's, or tensors that do not fit them.
    """
    bits, size, form = _settings(path, entry)

    def make(name: str, linear: nn.Linear, tensors: Tensors) -> nn.Module:
        rows, columns = linear.out_features, linear.in_features
        width = columns if size is None else size
        if columns % BLOCK or rows % BLOCK or columns % width:
            raise InputError(f"[{rows}, {columns}] is not divisible by {BLOCK} and into groups of {width} columns")
        groups = columns // width
        stored = GPTQTensors(
            tensors.take(f"{name}.qweight", (columns * bits // 32, rows), torch.int32),
            tensors.take(f"{name}.qzeros", (groups, rows * bits // 32), torch.int32),
            tensors.take(f"{name}.scales", (groups, rows), torch.float16),
            tensors.take(f"{name}.g_idx", (columns,), torch.int32),
        )
        return QuantizedLinear(from_tensors(stored, bits, size, form), tensors.bias(name, linear))

    def quantized(model: "PreTrainedModel", tensors: Tensors) -> set[str]:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return {name for name in linears if any(f"{name}.{part}" in tensors for part in PARTS)}

    return read_with(path, quantized, make)


def _settings(path: Path, entry: dict[str, Any]) -> tuple[int, int | None, str]:
    """Bits, group size and checkpoint format."""
    bits, size = entry.get("bits"), entry.get("group_size")
    form = entry.get("checkpoint_format", entry.get("format", "gptq"))
    if bits not in BITS or type(bits) is not int:
        raise InputError(f"{path}/config.json: bits must be one of {BITS}, got {bits!r}")
    if type(size) is not int or not (size == -1 or size > 0):
        raise InputError(f"{path}/config.json: group_size must be -1 (a whole row) or positive, got {size!r}")
    if form not in FORMATS:
        raise InputError(f"{path}/config.json: checkpoint_format must be one of {', '.join(FORMATS)}, got {form!r}")
    return bits, None if size == -1 else size, form
