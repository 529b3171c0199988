"""Reads the folder that `bitnet.export.packed` writes: memory-mapped, checked, and executing nothing."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export.codec import restore_activation, restore_weight
from bitnet.export.hf_read import read_tokenizer
from bitnet.export.parity import dense_tensors, rotary_tables
from bitnet.export.reading import Loaded
from bitnet.export.tensorfile import TensorFile
from bitnet.models.empty import empty_causal_lm
from bitnet.models.generation_config import read_generation
from bitnet.nn import PackedLinear, QuantizedEmbedding, QuantizedLinear
from bitnet.nn.linears import is_conv1d, is_linear
from bitnet.quant import PackedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST, TENSORS = "bitnet.json", "model.safetensors"
FORMAT, VERSION = "bitnet-packed", 2
FIELDS = {"config": dict, "dtype": str, "layers": dict, "tied": dict, "checksums": dict, "files": dict, "record": dict}
# What values that do not belong together raise, wherever they first meet
MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def read(path: str | Path, *, verify: bool = True) -> Loaded:
    """Load a packed folder, memory-mapped. Ternary and sign layers come as `PackedLinear`, others as `QuantizedLinear`.

    Args:
        path: the folder.
        verify: compare the checksums of tensors and files, and look for bytes that are no codes and for values that are
            not finite, which reads everything once. False leaves ternary and sign codes, and what is stored in the
            model's dtype, unread until it is used, and so damage unnoticed. Other codes are unpacked, and other dtypes
            converted, when they are loaded, and scales are looked at in any case.

    Raises:
        InputError: no packed folder, one of another version, or a damaged one; the message names the tensor.
    """
    path = Path(path)
    try:
        return _read(path, _manifest(path), verify)
    except InputError:
        raise
    except MISFITS as error:
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {error}: it is damaged") from error


def checksum(manifest: Mapping[str, Any]) -> int:
    """CRC-32 of the manifest without its own, as json with sorted keys."""
    plain = {key: value for key, value in manifest.items() if key != "checksum"}
    return zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def _read(path: Path, manifest: dict[str, Any], verify: bool) -> Loaded:
    file = TensorFile(path / TENSORS, manifest["checksums"] if verify else {})
    if strange := sorted(file.names ^ manifest["checksums"].keys()):
        raise InputError(f"{path}: {MANIFEST} and {TENSORS} do not belong together: {', '.join(strange[:3])}")
    if verify:
        _refuse_other_files(path, manifest["files"])
    model = empty_causal_lm(manifest["config"], most_layers=len(file.names))
    if not all(bool(torch.isfinite(table).all()) for table in rotary_tables(model).values()):
        raise InputError(f"{path}: the config describes rotary frequencies that are not finite: it is damaged")
    dtype = getattr(torch, manifest["dtype"], None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"{path}/{MANIFEST} names the dtype {manifest['dtype']!r}, which is no floating one")
    taken = _Reading(path, file, model, dtype, verify)
    for name, entry in manifest["layers"].items():
        taken.layer(name, entry)
    taken.rest(manifest["tied"])
    model.generation_config = read_generation(path) or model.generation_config
    return Loaded(model.requires_grad_(False).eval(), _tokenizer(path), path, "packed", manifest["record"])


class _Reading:
    """Fills an empty body from the file of tensors."""

    def __init__(
        self, path: Path, file: TensorFile, model: "PreTrainedModel", dtype: torch.dtype, verify: bool
    ) -> None:
        self._path, self._file, self._model, self._dtype, self._verify = path, file, model, dtype, verify
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
            _refuse_other_place(place, entry["kind"])
            if entry["kind"] == "embedding":
                made: nn.Module = QuantizedEmbedding(weight, self._dtype)
            else:
                bias = self._take(f"{name}.bias").to(self._dtype) if getattr(place, "bias", None) is not None else None
                if isinstance(weight, PackedTensor):
                    if self._verify:
                        weight.unpack()  # refuses bytes that are no codes: a kernel would not
                    made = PackedLinear(weight, bias, activation)
                else:
                    made = QuantizedLinear(weight, bias, activation)
        except MISFITS as error:
            raise InputError(f"{self._path}, {name}: {error}") from error
        self._model.set_submodule(name, made)

    def rest(self, tied: Mapping[str, str]) -> None:
        """Give every other parameter and buffer its values; what is left over or missing is an error."""
        values, places = dict[str, Tensor](), dict(dense_tensors(self._model))
        if strange := sorted(tied.keys() - places.keys()):
            raise InputError(f"{self._path}: {strange[0]} is tied, and the model has no such tensor: it is damaged")
        for name, tensor in places.items():
            if name in self._used:  # a bias that its layer has
                continue
            source = tied.get(name, name)
            value = values[source] if source in values else self._take(source)
            if tuple(value.shape) != tuple(tensor.shape):
                raise InputError(f"{self._path}: {name} is {list(value.shape)}, the model takes {list(tensor.shape)}")
            values[name] = value.to(self._dtype) if value.is_floating_point() else value
        for name, value in values.items():
            if self._verify and value.is_floating_point() and not bool(torch.isfinite(value).all()):
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
    for key, kind in FIELDS.items():
        if not isinstance(manifest.get(key), kind):
            raise InputError(f"{file} has no {key}: the file is damaged")
    if manifest.get("checksum") != checksum(manifest):
        raise InputError(f"{file} does not say what was written (its checksum differs): the file is damaged")
    return manifest


def _refuse_other_files(path: Path, checksums: Mapping[str, int]) -> None:
    for name, expected in checksums.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{path / MANIFEST} names the file {name!r}, which is not in the folder")
        try:
            found = zlib.crc32((path / name).read_bytes())
        except OSError as error:
            raise InputError(f"{path} lacks {name}, or it cannot be read: {error}") from error
        if found != expected:
            raise InputError(
                f"{path / name} is not what was written: it is damaged, or was edited; to use it as it is, read the "
                "folder with bitnet.export.packed_read.read(path, verify=False) and export it again"
            )


def _refuse_other_place(place: nn.Module, kind: str) -> None:
    """Only what a plain layer computes is computed from codes: Gemma's embedding, say, scales its rows as well."""
    fits = {"embedding": type(place) is nn.Embedding, "linear": is_linear(place)}
    if not fits.get(kind, False):
        raise InputError(
            f"the model has a {type(place).__name__} there, which codes of the kind {kind!r} cannot replace"
        )


def _tokenizer(path: Path) -> "PreTrainedTokenizerBase | None":
    try:
        return read_tokenizer(path)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot parse
        raise InputError(f"{path} has a tokenizer that does not load: {error}") from error


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
