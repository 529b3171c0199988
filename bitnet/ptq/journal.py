"""Finished blocks on disk, so that a quantization that was killed goes on where it was, and ends with the same result.

A folder holds ``settings.json`` (what was asked for, on which model and text) and ``block_00007.safetensors`` for every
finished block: the tensors of its quantized weights, and in the header what else they are made of. Hidden states are
not kept: running the text through finished blocks again gives the same ones, at a small part of the cost.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.files import atomic_file
from bitnet.quant import QuantizedWeight

if TYPE_CHECKING:
    from bitnet.ptq.settings import LayerResult

SETTINGS = "settings.json"


class Journal:
    """The finished blocks of one quantization.

    Args:
        directory: where they are; made where it does not exist.
        identity: what the result depends on: tensors and models by their contents, everything else by its ``repr``.

    Raises:
        InputError: ``directory`` holds blocks of a quantization with another identity, or something else.
    """

    def __init__(self, directory: Path, identity: Mapping[str, object]) -> None:
        self._directory = directory
        self._settings = {name: _fingerprint(value) for name, value in identity.items()}
        file = directory / SETTINGS
        if file.exists():
            _refuse_other(directory, json.loads(file.read_text(encoding="utf-8")), self._settings)
        elif directory.exists() and any(each.suffix != ".partial" for each in directory.iterdir()):
            raise InputError(f"{directory} is not empty and no unfinished quantization: name a new folder")

    def has(self, index: int) -> bool:
        """Whether block number ``index`` is finished."""
        return self._file(index).exists()

    def keep(
        self,
        index: int,
        weights: Mapping[str, QuantizedWeight],
        extra: Mapping[str, Tensor],
        results: Sequence["LayerResult"],
    ) -> None:
        """Write a finished block: its quantized weights by layer, other tensors to restore, and the results."""
        if not (self._directory / SETTINGS).exists():
            with atomic_file(self._directory / SETTINGS) as partial:
                partial.write_text(json.dumps(self._settings, indent=2), encoding="utf-8")
        tensors = {f"extra|{name}": tensor.contiguous() for name, tensor in extra.items()}
        layers: dict[str, Any] = {}
        for name, weight in weights.items():
            parts = {each.name: getattr(weight, each.name) for each in fields(weight)}  # pyright: ignore
            tensors |= {f"{name}|{key}": part.contiguous() for key, part in parts.items() if isinstance(part, Tensor)}
            plain = {key: part for key, part in parts.items() if not isinstance(part, Tensor)}
            layers[name] = {"type": f"{type(weight).__module__}:{type(weight).__qualname__}", "plain": plain}
        header = {"layers": json.dumps(layers), "results": json.dumps([asdict(result) for result in results])}
        with atomic_file(self._file(index)) as partial:
            save_file(tensors, partial, metadata=header)

    def restore(
        self, index: int, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor], list[dict[str, Any]]]:
        """What `keep` got, on ``device``: weights, other tensors, and the fields of the results.

        Raises:
            InputError: the file is damaged.
        """
        try:
            with safe_open(self._file(index), framework="pt") as file:  # pyright: ignore[reportPrivateImportUsage]
                header = file.metadata()
                tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(
                f"{self._file(index)} is damaged ({error}): remove it to quantize the block again"
            ) from error
        split: dict[str, dict[str, Tensor]] = {"extra": {}}
        for name, tensor in tensors.items():
            owner, _, field = name.partition("|")
            split.setdefault(owner, {})[field] = tensor
        weights = {
            name: _weight_type(each["type"])(**split[name], **each["plain"])
            for name, each in json.loads(header["layers"]).items()
        }
        return weights, split["extra"], json.loads(header["results"])

    def _file(self, index: int) -> Path:
        return self._directory / f"block_{index:05d}.safetensors"


def _weight_type(name: str) -> type[Any]:
    module, _, qualified = name.partition(":")
    if not module.startswith("bitnet."):
        raise InputError(f"a block of an unfinished quantization names the type {name}, which is none of this package")
    return getattr(import_module(module), qualified)


def _refuse_other(directory: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{directory} holds an unfinished quantization with another {name}: {found.get(name)}, now "
                f"{wanted.get(name)}. Go on with the same settings, or name a new folder"
            )


def _fingerprint(value: object) -> str:
    if isinstance(value, nn.Module):
        digest = hashlib.sha256()
        for name, tensor in value.state_dict().items():
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            for part in tensor.detach().flatten().split(1 << 24):
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
        config: Any = getattr(value, "config", None)
        digest.update(config.to_json_string().encode() if hasattr(config, "to_json_string") else b"")
        return f"{type(value).__name__} {digest.hexdigest()[:16]}"
    if isinstance(value, Tensor):
        contents = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return f"{list(value.shape)} {hashlib.sha256(contents).hexdigest()[:16]}"
    if isinstance(value, partial):
        return f"{_fingerprint(value.func)} {value.args} {value.keywords}"
    if isinstance(value, FunctionType):
        return f"{value.__module__}:{value.__qualname__}"  # its repr has an address
    return repr(value)
