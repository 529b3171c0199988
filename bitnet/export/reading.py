"""What `load` gives, whichever format it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bitnet.errors import InputError
from bitnet.nn import QuantizedLinear, pack
from bitnet.quant import QTensor
from bitnet.quant.packed import is_packable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "bitnet.json"  # in a packed folder
RUN = "run.json"  # in the folder of a run


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model read from disk.

    Attributes:
        model: transformers' body in evaluation mode; its quantized linears are `QuantizedLinear` or `PackedLinear`.
        tokenizer: the one that was stored with it, if any.
        path: where it was read.
        format: for example "packed", "hf bitlinear", "gguf TQ2_0".
        record: the run that made it, where the format keeps it.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    path: Path
    format: str
    record: Mapping[str, Any] = field(default_factory=dict)


def load(path: str | Path) -> Loaded:
    """Read a model of any format: a packed or Hugging Face folder, a GGUF file, or the folder of a run.

    Nothing in the files is executed. A run's folder stands for its ``packed`` folder, or where there is none for a
    Hugging Face folder or a GGUF file in it. Ternary and sign layers come as `PackedLinear`, whatever they were stored
    as: they run on the kernels.

    Raises:
        InputError: nothing of the kind is there, or what is there is damaged.
    """
    loaded = _read(Path(path))
    if any(map(_waits_for_packing, loaded.model.modules())):
        pack(loaded.model)
    return loaded


def _waits_for_packing(layer: nn.Module) -> bool:
    weight = layer.weight if isinstance(layer, QuantizedLinear) else None
    return isinstance(weight, QTensor) and is_packable(weight)


def _read(path: Path) -> Loaded:
    if path.is_file():
        if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
            from bitnet.export.gguf import read as read_gguf

            return read_gguf(path)
        raise InputError(f"{path} is no GGUF file: give a .gguf file, or a folder with a model in it")
    if (path / MANIFEST).is_file():
        from bitnet.export.packed_read import read as read_packed

        return read_packed(path)
    if (path / "config.json").is_file():
        from bitnet.export.hf import read as read_hf

        return read_hf(path)
    if (path / RUN).is_file():
        for pattern in ("packed", "hf", "hf-*", "gptq", "*.gguf"):
            for found in sorted(path.glob(pattern)):
                return _read(found)
        raise InputError(f"{path} is the folder of a run that exported nothing: run it again with export=[packed]")
    raise InputError(
        f"no model in {path}: expected a folder with {MANIFEST} (packed), config.json (Hugging Face) or {RUN} (a run), "
        "or a .gguf file"
    )


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic
