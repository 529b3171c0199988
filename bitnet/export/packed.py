"""The folder of our own: every quantized weight in as many bits as it has, beside everything that the model needs.

::

    bitnet.json             version, transformers config, an entry a quantized layer, tied tensors, record; checksums of
                            every tensor, of the files beside it, and of itself
    model.safetensors       codes and scales by layer; embeddings, norms, biases, head
    tokenizer.json ...      as transformers writes it
    generation_config.json  what the model has, also where transformers would not save it
    README.md               the model card

It holds whatever a model of this package can hold, so every other format can be made from it. Ternary codes are packed
as ``i2`` (what kernels take) or ``t5``, signs as ``b1``, wider codes in as many bits as they have. It is read
memory-mapped; nothing in it is executed.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export.card import model_card
from bitnet.export.codec import store_activation, store_weight
from bitnet.export.packed_problems import body_problems, rounding_problems, tokenizer_problems
from bitnet.export.packed_read import FORMAT, MANIFEST, TENSORS, VERSION, checksum, read
from bitnet.export.parity import (
    SAME_ARITHMETIC,
    compare_codes,
    compare_logits,
    dense_tensors,
    difference,
    logits,
    quantized_layers,
    refuse_non_finite,
    size_of,
    token_ids,
    weight_of,
)
from bitnet.export.protocol import Exported, ExportError, refuse_problems
from bitnet.export.tensorfile import header_room, write_tensors
from bitnet.files import atomic_directory
from bitnet.models.empty import plain_config
from bitnet.models.generation_config import generation_entry, write_generation
from bitnet.nn import QuantizedEmbedding, QuantizedModule
from bitnet.quant import QTensor, absmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REST = {  # what everything but the codes is stored in
    "exact": "in the narrowest dtype that is exact",
    "float32": "in float32",
    "bfloat16": "rounded to bfloat16",
    "int8": "exact but for embeddings and head, which are rounded to int8",
}
CODE = ["import bitnet", "", 'loaded = bitnet.load("this folder")', "model, tokenizer = loaded.model, loaded.tokenizer"]


@dataclass(frozen=True, slots=True)
class PackedExporter:
    """Writes the folder that the module's docstring describes.

    Args:
        layout: of ternary codes: "i2" (2 bits, what kernels read) or "t5" (1.6 bits).
        rest: what embeddings, norms, biases and head are stored in. "exact": bfloat16 where it holds every value of a
            tensor, else the dtype they have. "float32". "bfloat16": rounded. "int8": embeddings and head in int8 with a
            scale a row, the rest exact.

    Raises:
        InputError: options that do not exist.
    """

    layout: str = "i2"
    rest: str = "exact"

    def __post_init__(self) -> None:
        if self.layout not in ("i2", "t5"):
            raise InputError(f"layout must be i2 or t5, got {self.layout!r}")
        if self.rest not in REST:
            raise InputError(f"rest must be one of {', '.join(REST)}, got {self.rest!r}")

    @property
    def filename(self) -> str:
        return "packed"

    def problems(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[str]:
        """See `bitnet.export.Exporter`."""
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            return [f"it is a {type(model).__name__}: only transformers' causal language models can be rebuilt"]
        found = body_problems(model)
        if self.rest == "int8":
            found += rounding_problems(model)
        if tokenizer is not None:
            found += tokenizer_problems(model, tokenizer)
        activations = list[str]()
        for name, layer in quantized_layers(model).items():
            try:
                store_activation(getattr(layer, "activation", None))
            except InputError as error:
                activations.append(f"{name}: {error}")
        return found + activations[:3]

    def write(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase | None",
        path: str | Path,
        record: Mapping[str, Any] | None = None,
    ) -> Exported:
        """See `bitnet.export.Exporter`."""
        from transformers import PreTrainedModel

        refuse_problems(self.problems(model, tokenizer), "a packed folder")
        assert isinstance(model, PreTrainedModel)
        refuse_non_finite(model)
        contents = f"codes and scales of {len(quantized_layers(model))} layers; the rest {REST[self.rest]}"
        card = model_card(contents, code=CODE, library=None, record=record)
        plain_record = _as_json(dict(record or {}))
        with atomic_directory(path) as folder:
            writing = _Writing(model, self)
            checksums = write_tensors(folder / TENSORS, writing.tensors(), header_room(writing.names()))
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            write_generation(model, folder)
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "config": plain_config(model),
                "dtype": str(model.dtype).removeprefix("torch."),
                "layers": writing.layers,
                "tied": writing.tied,
                "checksums": checksums,
                "files": _files(folder),
                "record": plain_record,
            }
            manifest = {**manifest, "checksum": checksum(manifest)}
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(card, encoding="utf-8")
            layers, distance = self._check(model, folder)
            size = size_of(folder)
        return Exported(
            path=Path(path),
            format=f"packed {self.layout}" if writing.has_layout else "packed",
            contents=contents,
            bytes=size,
            layers=layers,
            difference=distance,
        )

    def kept(self, tensor: Tensor, in_matrix: bool) -> Tensor | QTensor:
        """What ``tensor`` of the rest is stored as; ``in_matrix``: it is the embedding or the head."""
        if not tensor.is_floating_point():
            return tensor
        if self.rest == "int8" and in_matrix:
            return absmax(tensor)
        if self.rest == "bfloat16":
            return tensor.bfloat16()
        if self.rest == "float32":
            return tensor.float()
        narrow = tensor.bfloat16()
        return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor

    def _check(self, model: "PreTrainedModel", folder: Path) -> tuple[int, float]:
        """Read ``folder`` back and compare; return the number of layers with codes and the difference of the logits.

        The logits have to be those of ``model`` with its rest rounded as the file has it, to the last digits; the
        difference is that from ``model`` itself.
        """
        try:
            loaded = read(folder).model
        except InputError as error:
            raise ExportError(f"what was written does not read back: {error}") from error
        generation = generation_entry(model)
        if generation is not None and generation_entry(loaded) != generation:
            raise ExportError("other generation settings are read back than were written")
        layers = self._compare(model, loaded)
        if (attention := model.config._attn_implementation) is not None:
            loaded.set_attn_implementation(attention)
        loaded.to(device=model.device)  # pyright: ignore[reportCallIssue]  # transformers wraps it without types
        ids = token_ids(model)
        answer = logits(loaded, ids)
        rounded = self._rounded(model)
        distance = compare_logits(logits(model, ids, rounded), answer, SAME_ARITHMETIC, "by this package")
        return layers, difference(logits(model, ids), answer) if rounded else distance

    def _rounded(self, model: "PreTrainedModel") -> dict[str, Tensor]:
        """Those tensors of the rest that are rounded, by name, with the values that the file has for them."""
        matrices = {id(matrix) for matrix in _matrices(model)}
        values, seen = dict[str, Tensor](), set[int]()
        for name, tensor in dense_tensors(model) if self.rest != "exact" else ():
            parameter = _parameter(model, name)
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kept = self.kept(tensor, id(parameter) in matrices)
            value = kept.to(tensor.dtype) if isinstance(kept, Tensor) else kept.dequantize(tensor.dtype)
            if not torch.equal(value, tensor):
                values[name] = value
        return values

    def _compare(self, model: "PreTrainedModel", loaded: "PreTrainedModel") -> int:
        """Compare codes and every other tensor with what was meant; return the number of layers with codes."""
        found = quantized_layers(loaded)
        rounded = [name for name in found if name not in quantized_layers(model)]  # embedding or head in int8
        for name in rounded:
            original = model.get_submodule(name).weight
            assert isinstance(original, Tensor)
            if not torch.equal(absmax(original).dequantize(), weight_of(found[name]).dequantize()):
                raise ExportError(f"{name}: the int8 codes read back are not those that were written")
        layers = compare_codes(model, loaded, beside=rounded)
        values = dict(dense_tensors(loaded))
        for name, tensor in dense_tensors(model):
            if name.removesuffix(".weight") not in rounded:
                kept = self.kept(tensor, in_matrix=False)
                assert isinstance(kept, Tensor)
                if name not in values or not torch.equal(values[name], kept.to(tensor.dtype)):
                    raise ExportError(f"{name}: the values read back are not those that were written")
        return layers


class _Writing:
    """The tensors of one model in the order of its modules; ``layers`` and ``tied`` fill up as they are taken."""

    def __init__(self, model: "PreTrainedModel", options: PackedExporter) -> None:
        self._model, self._options = model, options
        self._quantized = quantized_layers(model)
        self._matrices = {id(matrix) for matrix in _matrices(model)} if options.rest == "int8" else set[int]()
        self.layers: dict[str, dict[str, Any]] = {}
        self.tied: dict[str, str] = {}

    @property
    def has_layout(self) -> bool:
        """Whether there are codes in the layout that was asked for: ternary ones."""
        return any(each["weight"].get("layout") == self._options.layout for each in self.layers.values())

    def names(self) -> Iterator[str]:
        """Every name that `tensors` will give, and a few more."""
        for name, _ in dense_tensors(self._model):
            yield from (f"{name}.{part}" for part in ("codes", "scale"))
        for name, layer in self._quantized.items():
            own = dict(layer.named_buffers()) if isinstance(layer, QuantizedModule) else {}
            yield from (f"{name}.{part}" for part in {"packed", "scale", "zero_point", *own})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, layer in self._quantized.items():
            yield from self._of_layer(name, layer)
        first: dict[int, str] = {}
        for name, tensor in dense_tensors(self._model):
            parameter = _parameter(self._model, name)
            if id(parameter) in first:
                self._tie(name, first[id(parameter)])
                continue
            first[id(parameter)] = name
            kept = self._options.kept(tensor, id(parameter) in self._matrices)
            if isinstance(kept, Tensor):
                yield name, kept
            else:
                yield from self._matrix_in_int8(name, kept)

    def _tie(self, name: str, first: str) -> None:
        """Note that ``name`` is the parameter ``first`` again."""
        home = first.removesuffix(".weight")
        if home in self.layers:  # its codes serve both
            self.layers[name.removesuffix(".weight")] = {**self.layers[home], "kind": "linear", "home": home}
        else:
            self.tied[name] = first

    def _of_layer(self, name: str, layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
        weight = store_weight(weight_of(layer), self._options.layout)
        activation = store_activation(getattr(layer, "activation", None))
        kind = "embedding" if isinstance(layer, QuantizedEmbedding) else "linear"
        self.layers[name] = {
            "kind": kind,
            "weight": weight.entry,
            "tensors": sorted(weight.tensors),
            "activation": activation.entry if activation else None,
        }
        yield from ((f"{name}.{part}", tensor) for part, tensor in weight.tensors.items())
        if activation:
            yield from ((f"{name}.activation.{part}", tensor) for part, tensor in activation.tensors.items())

    def _matrix_in_int8(self, name: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        name = name.removesuffix(".weight")
        stored = store_weight(weight, self._options.layout)
        kind = "embedding" if isinstance(self._model.get_submodule(name), nn.Embedding) else "linear"
        self.layers[name] = {
            "kind": kind,
            "weight": stored.entry,
            "tensors": sorted(stored.tensors),
            "activation": None,
        }
        yield from ((f"{name}.{part}", tensor) for part, tensor in stored.tensors.items())


def _as_json(record: dict[str, Any]) -> dict[str, Any]:
    """The record as json gives it back.

    Raises:
        InputError: json has no word for a value in it.
    """
    try:
        return json.loads(json.dumps(record))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the record must be numbers, texts, lists and dicts, as json has them: {error}") from error


def _files(folder: Path) -> dict[str, int]:
    """CRC-32 of every file of the folder but the tensors, which have their own."""
    files = sorted(each for each in folder.rglob("*") if each.is_file() and each.name != TENSORS)
    return {each.relative_to(folder).as_posix(): zlib.crc32(each.read_bytes()) for each in files}


def _matrices(model: "PreTrainedModel") -> list[nn.Parameter]:
    """Weights of the embedding and the head that are dense."""
    homes = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(home, "weight", None) for home in homes]
    return [weight for weight in weights if isinstance(weight, nn.Parameter)]


def _parameter(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)
