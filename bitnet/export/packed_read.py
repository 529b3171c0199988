"""Reads the folder that `bitnet.export.packed` writes: memory-mapped, checked, and executing nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export.codec import restore_activation, restore_weight
from bitnet.export.parity import dense_tensors
from bitnet.export.reading import Loaded
from bitnet.export.tensorfile import TensorFile
from bitnet.models.empty import empty_causal_lm
from bitnet.nn import PackedLinear, QuantizedEmbedding, QuantizedLinear
from bitnet.nn.linears import is_conv1d
from bitnet.quant import PackedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST, TENSORS = "bitnet.json", "model.safetensors"
FORMAT, VERSION = "bitnet-packed", 1


def read(path: str | Path, *, verify: bool = True) -> Loaded:
    """Load a packed folder, memory-mapped. Ternary and sign layers come as `PackedLinear`, others as `QuantizedLinear`.

    Args:
        path: the folder.
        verify: compare the checksum of every tensor, which reads the whole file once. False reads a tensor's bytes when
            they are first used.

    Raises:
        InputError: no packed folder, one of a newer version, or a damaged one; the message names the tensor.
    """
    path = Path(path)
    manifest = _manifest(path)
    file = TensorFile(path / TENSORS, manifest["checksums"] if verify else {})
    if strange := sorted(file.names ^ manifest["checksums"].keys()):
        raise InputError(f"{path}: {MANIFEST} and {TENSORS} do not belong together: {', '.join(strange[:3])}")
    model = empty_causal_lm(manifest["config"])
    dtype = getattr(torch, manifest["dtype"], None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"{path}/{MANIFEST} names the dtype {manifest['dtype']!r}, which is no floating one")
    taken = _Reading(path, file, model, dtype)
    for name, entry in manifest["layers"].items():
        taken.layer(name, entry)
    taken.rest(manifest["tied"])
    return Loaded(model.requires_grad_(False), _tokenizer(path), path, "packed", manifest["record"])


class _Reading:
    """Fills an empty body from the file of tensors."""

    def __init__(self, path: Path, file: TensorFile, model: "PreTrainedModel", dtype: torch.dtype) -> None:
        self._path, self._file, self._model, self._dtype = path, file, model, dtype
        self._used: set[str] = set()

    def layer(self, name: str, entry: Mapping[str, Any]) -> None:
        """Put the quantized layer ``name`` in the place of the dense one."""
        try:
            place = self._model.get_submodule(name)
            home = entry.get("home", name)
            weight = restore_weight(entry["weight"], {part: self._take(f"{home}.{part}") for part in entry["tensors"]})
            prefix = f"{name}.activation."
            parts = [each for each in sorted(self._file.names) if each.startswith(prefix)]
            inputs = {each.removeprefix(prefix): self._take(each) for each in parts}
            activation = restore_activation(entry["activation"], inputs)
            if tuple(weight.shape) != _shape(place):
                raise InputError(f"the model has {list(_shape(place))} there, the file {list(weight.shape)}")
            if entry["kind"] == "embedding":
                made: nn.Module = QuantizedEmbedding(weight, self._dtype)
            else:
                bias = self._take(f"{name}.bias").to(self._dtype) if getattr(place, "bias", None) is not None else None
                if isinstance(weight, PackedTensor):
                    weight.unpack()  # refuses bytes that are no codes: a kernel would not
                    made = PackedLinear(weight, bias, activation)
                else:
                    made = QuantizedLinear(weight, bias, activation)
        except (InputError, AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{self._path}, {name}: {error}") from error
        self._model.set_submodule(name, made)

    def rest(self, tied: Mapping[str, str]) -> None:
        """Give every other parameter and buffer its values; what is left over or missing is an error."""
        values: dict[str, Tensor] = {}
        for name, tensor in dense_tensors(self._model):
            if name in self._used:  # a bias that its layer has
                continue
            source = tied.get(name, name)
            value = values[source] if source in values else self._take(source)
            if tuple(value.shape) != tuple(tensor.shape):
                raise InputError(f"{self._path}: {name} is {list(value.shape)}, the model takes {list(tensor.shape)}")
            values[name] = value.to(self._dtype) if value.is_floating_point() else value
        for name, value in values.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise InputError(f"{self._path}: {name} holds NaN or infinity: the file is damaged")
            _assign(self._model, name, value)
        if tied:
            self._model.tie_weights()
        if unused := sorted(self._file.names - self._used):
            raise InputError(f"{self._path} holds {', '.join(unused[:3])}, which the model has no place for")

    def _take(self, name: str) -> Tensor:
        self._used.add(name)
        return self._file.take(name)


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"expected a packed folder, one with {MANIFEST} in it, got {path}") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{file} is no description of a packed folder (format {FORMAT})")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path} is a packed folder of version {manifest.get('version')}, this package reads version {VERSION}: "
            "install the one that wrote it"
        )
    kinds = {"config": dict, "dtype": str, "layers": dict, "tied": dict, "checksums": dict, "record": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise InputError(f"{file} has no {key}: the file is damaged")
    return manifest


def _tokenizer(path: Path) -> "PreTrainedTokenizerBase | None":
    if not (path / "tokenizer_config.json").exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if attribute in module._parameters:
        module.register_parameter(attribute, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(attribute, value)


def _shape(place: nn.Module) -> tuple[int, ...]:
    """[out, in] of a linear, [entries, features] of an embedding."""
    weight = place.weight
    assert isinstance(weight, Tensor)
    return tuple(reversed(weight.shape) if is_conv1d(place) else weight.shape)
