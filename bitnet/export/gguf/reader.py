"""A GGUF file as a transformers model whose quantized layers are `QuantizedLinear`, bytes mapped from the file.

Files of other programs load too where architecture, types and rotary positions are known here: k-quants become
`GGMLWeight`, ternary types become codes and a scale (Q4_0 and Q8_0 with a ``.scale`` beside them, too).
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export.gguf.activations import KEY, read_activation
from bitnet.export.gguf.architecture import Architecture, deinterleave, read_config
from bitnet.export.gguf.container import Container
from bitnet.export.gguf.tokenizer import read_tokenizer
from bitnet.export.gguf.types import DENSE, SIGNS, is_finite
from bitnet.export.gguf.weights import decode
from bitnet.export.reading import Loaded
from bitnet.models.empty import empty_causal_lm
from bitnet.models.generation_config import generation_from
from bitnet.nn import QuantizedEmbedding, QuantizedLinear
from bitnet.quant import QuantizedWeight, Quantizer, absmax

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

RECORD = "bitnet_qat.record"
GENERATION = "bitnet_qat.generation"


class GGUFFile:
    """An opened file: its header checked against the body that it describes, its weights by transformers' names.

    Raises:
        InputError: no readable GGUF file, or tensors that are missing, left over or of another shape.
    """

    def __init__(self, path: str | Path) -> None:
        self.container = Container(path)
        architecture, config = read_config(self.container)
        self.architecture: Architecture = architecture
        self.empty = empty_causal_lm(config)
        self.config: Any = self.empty.config
        self.empty.generation_config = self._generation() or self.empty.generation_config
        self.activation = self._activation()
        self._refuse_other_tensors()

    @property
    def label(self) -> str:
        """ "gguf TQ2_0": the type of most matrices of the blocks."""
        types = Counter(
            entry.type.name
            for name, entry in self.container.tensors.items()
            if name.startswith("blk.") and len(entry.shape) == 2
        )
        return f"gguf {types.most_common(1)[0][0]}"

    def weight(self, name: str) -> Tensor | QuantizedWeight:
        """Weight [out, in] of the linear or embedding ``name``: values in the dtype of the file, or codes.

        Raises:
            InputError: bytes that no weight has; see `decode`.
        """
        stored = self._stored(name + ".weight")
        entry = self.container.tensors[stored]
        data, scale = self.container.bytes(stored), self._scale(stored)
        if entry.type.tail:
            data, tail = data[: -entry.type.tail], data[-entry.type.tail :]
            scale = float(tail[:4].clone().view(torch.float32))
            _refuse_bad_scale(scale, stored)
        rows = deinterleave(data.unflatten(0, (entry.shape[0], -1)), self.architecture.heads(name, self.config))
        return decode(rows, entry.type, entry.shape[-1], scale, f"{self.container.path}: {stored}")

    def dense(self, name: str) -> Tensor:
        """Values of the parameter ``name`` (a norm, a bias, a dense matrix) in the dtype of the file.

        Raises:
            InputError: they are quantized, or one is NaN or infinite.
        """
        if name.endswith(".weight") and len(self.container.tensors[self._stored(name)].shape) == 2:
            value = self.weight(name.removesuffix(".weight"))
        else:
            stored = self._stored(name)
            entry = self.container.tensors[stored]
            if entry.type.name not in DENSE:
                raise InputError(f"{self.container.path}: {stored} must not be quantized, got {entry.type.name}")
            value = self.container.bytes(stored).view(DENSE[entry.type.name])
            value = deinterleave(value, self.architecture.heads(name, self.config))
        assert isinstance(value, Tensor)
        if not is_finite(value):
            raise InputError(f"{self.container.path}: {self._stored(name)} holds NaN or infinity: the file is damaged")
        return value

    def is_quantized(self, name: str) -> bool:
        """Whether the matrix of the module ``name`` is stored as codes."""
        return self.type_of(name) not in DENSE

    def type_of(self, name: str) -> str:
        """The type of the matrix of the module ``name``, for example "TQ2_0"."""
        return self.container.tensors[self._stored(name + ".weight")].type.name

    def record(self) -> Mapping[str, Any]:
        """The run that made the model, where the file keeps one."""
        try:
            record = json.loads(self.container.text(RECORD, "{}"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.container.path}: {RECORD} is no json: the file is damaged") from error
        if not isinstance(record, dict):
            raise InputError(f"{self.container.path}: {RECORD} must be a json object")
        return record

    def _generation(self) -> "GenerationConfig | None":
        if GENERATION not in self.container.pairs:
            return None
        where = f"{self.container.path}: {GENERATION}"
        try:
            entry = json.loads(self.container.text(GENERATION))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is no json: the file is damaged") from error
        return generation_from(entry, where, self.config.vocab_size)

    def _activation(self) -> Quantizer | None:
        if KEY in self.container.pairs:
            return read_activation(self.container.text(KEY))
        names = {entry.type.name for entry in self.container.tensors.values()}
        return absmax if names & set(SIGNS) else None  # ternary models of others are BitNets: int8 inputs

    def _scale(self, stored: str) -> float | None:
        beside = stored.removesuffix("weight") + "scale"
        if beside not in self.container.tensors:
            return None
        entry = self.container.tensors[beside]
        if entry.type.name != "F32" or entry.shape != (1,):
            raise InputError(f"{beside} must be one float32 number, got {entry.type.name} {list(entry.shape)}")
        scale = float(self.container.bytes(beside).view(torch.float32))
        _refuse_bad_scale(scale, beside)
        if self.container.tensors[stored].type.name in DENSE:
            raise InputError(f"{beside} stands beside a matrix that is not quantized: this is not computed here")
        return scale

    def _stored(self, name: str) -> str:
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        stored = self.architecture.gguf_name(name)
        assert stored is not None, name
        return stored

    def _refuse_other_tensors(self) -> None:
        path, found = self.container.path, self.container.tensors
        expected = {self._stored(name): tuple(tensor.shape) for name, tensor in self.empty.state_dict().items()}
        if missing := sorted(expected.keys() - found.keys()):
            raise InputError(f"{path} lacks {', '.join(missing[:3])}: truncated, or of another architecture?")
        for name, shape in expected.items():
            if found[name].shape != shape:
                raise InputError(f"{path}: {name} must be {list(shape)}, got {list(found[name].shape)}")
        scales = {name.removesuffix("weight") + "scale" for name, shape in expected.items() if len(shape) == 2}
        if left := sorted(found.keys() - expected.keys() - scales):
            raise InputError(f"{path} holds {', '.join(left[:3])}, which its architecture has no place for")
        if "token_embd.scale" in found:
            raise InputError(f"{path} holds token_embd.scale, which its architecture has no place for")


def read(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Loaded:
    """Load a GGUF file: model, tokenizer and record.

    Args:
        path: the file. It stays mapped while the model lives.
        dtype: of everything that is not quantized; float32 holds every stored value.

    Raises:
        InputError: no GGUF file that can be read, or a damaged one; the message names the tensor or key.
    """
    file = GGUFFile(path)
    model = build(file, dtype)
    return Loaded(model, read_tokenizer(file.container), Path(path), file.label, file.record())


def build(file: GGUFFile, dtype: torch.dtype, *, mapped: bool = False) -> "PreTrainedModel":
    """The model of a file.

    Args:
        mapped: leave quantized linears in the file, and unpack one when it is used: slow, and no memory for codes.
    """
    model = file.empty
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        bias = file.dense(f"{name}.bias").to(dtype) if getattr(module, "bias", None) is not None else None
        if not file.is_quantized(name):
            if bias is not None:
                _assign(module, "bias", bias)
            continue
        if isinstance(module, nn.Linear) and mapped:
            model.set_submodule(name, MappedLinear(file, name, bias))
            continue
        weight = file.weight(name)
        assert not isinstance(weight, Tensor)
        try:
            made = (
                QuantizedEmbedding(weight, dtype)
                if isinstance(module, nn.Embedding)
                else QuantizedLinear(weight, bias, file.activation)
            )
        except InputError as error:
            raise InputError(f"{file.container.path}: {name}: {error}") from error
        model.set_submodule(name, made)
    _fill(model, file, dtype)
    return model.requires_grad_(False).eval()


class MappedLinear(nn.Module):
    """A quantized linear whose weight stays in the file and is unpacked in every forward pass."""

    def __init__(self, file: GGUFFile, name: str, bias: Tensor | None) -> None:
        super().__init__()
        self.file, self.name = file, name
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.file.weight(self.name)
        assert not isinstance(weight, Tensor)
        layer = QuantizedLinear(weight, self.bias, self.file.activation)
        return layer.to(input.device)(input)


def _fill(model: "PreTrainedModel", file: GGUFFile, dtype: torch.dtype) -> None:
    """Give every parameter that is still empty its values."""
    values: dict[str, Tensor] = {}
    tied = file.config.tie_word_embeddings and not file.is_quantized("lm_head")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" or (tied and name == "lm_head.weight"):
            continue
        values[name] = file.dense(name).to(dtype)
    for name, value in values.items():
        module, _, attribute = name.rpartition(".")
        _assign(model.get_submodule(module), attribute, value)
    if tied:
        model.tie_weights()


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _refuse_bad_scale(scale: float, name: str) -> None:
    if not 0 < scale < float("inf"):  # NaN fails, too
        raise InputError(f"{name} must be positive and finite, got {scale}: the file is damaged")
