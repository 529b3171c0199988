"""Writes a GGUF file: what fits which type, and the gate that every file passes before it gets its name."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export.gguf.activations import KEY, activation_entry
from bitnet.export.gguf.architecture import Architecture, architecture_of, body_problems, interleave, settings
from bitnet.export.gguf.container import Blob, Value, write_container
from bitnet.export.gguf.reader import GENERATION, RECORD
from bitnet.export.gguf.tokenizer import ends_of, tokenizer_pairs, tokenizer_problems
from bitnet.export.gguf.types import DENSE, PIECE, SIGNS, TYPES, TensorType, is_finite
from bitnet.export.gguf.verify import verify
from bitnet.export.gguf.weights import Grid, encode, i2_s_tail, type_for
from bitnet.export.parity import dense_tensors, quantized_layers, refuse_non_finite, warm_up_problems, weight_of
from bitnet.export.protocol import Exported, refuse_problems
from bitnet.files import new_file
from bitnet.models.generation_config import generation_entry, generation_from
from bitnet.nn import BitLinear, QuantizedEmbedding, QuantizedModule
from bitnet.quant import PackedTensor, QTensor, QuantizedWeight
from bitnet.quant.ggml import GGMLWeight, absmax_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The first that holds every value. llama.cpp on a CPU rounds the inputs of such a matrix to its type, too: bfloat16
# makes 5e-3 of the logits' spread, float16 an eighth of that, float32 nothing.
NARROWEST = ("F16", "BF16", "F32")
EDGES = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFExporter:
    """One file for llama.cpp and what is built on it; with I2_S for bitnet.cpp.

    Codes and scales are copied, never made anew. Dense matrices are stored in the narrowest of f16, bf16 and f32 that
    holds every value: 16 bits where the model was kept in them, and never a rounding that nobody asked for.

    Args:
        type: of ternary and sign layers: TQ2_0, TQ1_0, Q2_0, Q1_0 (signs only) or I2_S. "auto": TQ2_0 (Q2_0 where rows
            or groups are no multiple of 256), Q1_0 for signs; k-quants keep their own type; other codes go into Q4_0
            or Q8_0 where they fit exactly.
        scale: "tensor": float32 beside the codes, exact. "block": in every block, rounded to float16 (by up to 0.05 %),
            for runtimes that do not know tensors ``.scale``.
        embeddings: of embedding and head: auto, f32, f16, bf16 or q8_0. All but auto and f32 may round.
        dense: of linears that are not quantized: auto, f32, f16 or bf16.

    Raises:
        InputError: an unknown option.
    """

    type: str = "auto"
    scale: str = "tensor"
    embeddings: str = "auto"
    dense: str = "auto"

    def __post_init__(self) -> None:
        dtypes = ("auto", "f32", "f16", "bf16")
        for name, choices in (
            ("type", ("auto", *SIGNS)),
            ("scale", ("tensor", "block")),
            ("embeddings", (*dtypes, "q8_0")),
            ("dense", dtypes),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.type == "I2_S" and self.scale == "block":
            raise InputError("I2_S keeps its scale in float32 and has none in blocks: set scale=tensor")

    @property
    def filename(self) -> str:
        return "model.gguf" if self.type == "auto" else f"model-{self.type}.gguf"

    def problems(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[str]:
        """See `bitnet.export.Exporter`. Looks at the values of scales, too."""
        try:
            architecture = architecture_of(model, self.type)
        except InputError as error:
            return [str(error)]
        found = warm_up_problems(model) + list(body_problems(architecture, model))
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, layer in quantized_layers(model).items():
            try:
                kind = self._type_of(name, layer)
                if self._scale_beside(layer, kind) and (why := architecture.scale_problem(name, _is_biased(layer))):
                    reasons[why].append(name)
            except InputError as error:
                reasons[str(error)].append(name)
        found += [f"{_these(names)}: {reason}" for reason, names in reasons.items()]
        if self.embeddings == "q8_0" and _config(model).hidden_size % 32:
            found.append("embeddings=q8_0 needs a hidden size that is a multiple of 32")
        try:
            activation_entry(model)
            if (generation := generation_entry(model)) is not None:
                generation_from(generation, "model.generation_config", _config(model).vocab_size)
        except InputError as error:
            found.append(str(error))
        if tokenizer is not None:
            found += tokenizer_problems(tokenizer, _config(model).vocab_size)
        return found

    def write(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase | None",
        path: str | Path,
        record: Mapping[str, Any] | None = None,
    ) -> Exported:
        """Write ``path``, read it back and compare; with llama-cpp-python installed, let llama.cpp compute it, too.

        Raises:
            InputError: ``path`` exists; the model or the tokenizer does not fit; a weight is NaN or infinite.
            ExportError: what was written does not give the model back, here or in llama.cpp. Nothing is left behind.
        """
        path = Path(path)
        refuse_problems(self.problems(model, tokenizer), "GGUF")
        refuse_non_finite(model)
        plan = _Plan(self, model)
        with new_file(path) as partial:
            pairs = plan.pairs(record) | tokenizer_pairs(tokenizer, _config(model).vocab_size, ends_of(model))
            write_container(partial, pairs, list(plan.blobs()))
            figures = verify(partial, model, tokenizer, plan.stored_dense, self.scale)
            size = partial.stat().st_size
        return Exported(path=path, format=plan.format, contents=plan.contents, bytes=size, **figures)

    def _type_of(self, name: str, layer: nn.Module) -> TensorType:
        """The type of a quantized layer. Raises InputError where it has none."""
        if name == EDGES[0] or isinstance(layer, QuantizedEmbedding):
            weight = weight_of(layer)
            if not isinstance(weight, GGMLWeight):
                raise InputError(
                    "an embedding has no place for these scales: export it dense (a packed folder with rest=int8: "
                    "again from the run, with rest=exact), and set embeddings=q8_0"
                )
            return type_for(weight, "auto", self.scale)
        if isinstance(layer, BitLinear):
            return type_for(Grid.of(layer.quantized_weight(), values=False), self.type, self.scale)
        assert isinstance(layer, QuantizedModule)
        return type_for(layer.weight, self.type, self.scale)

    def _scale_beside(self, layer: nn.Module, kind: TensorType) -> bool:
        """Whether a tensor ``.scale`` goes beside the codes of a layer of that type."""
        if self.scale == "block" or kind.name == "I2_S":
            return False
        if isinstance(layer, BitLinear):
            return Grid.of(layer.quantized_weight(), values=False).scales == (1, 1)
        assert isinstance(layer, QuantizedModule)
        weight = layer.weight
        return isinstance(weight, QTensor | PackedTensor) and Grid.of(weight).scales == (1, 1)


class _Plan:
    """What goes into one file, in which order; bytes are made when they are written."""

    def __init__(self, exporter: GGUFExporter, model: nn.Module) -> None:
        self.exporter, self.model = exporter, model
        self.architecture: Architecture = architecture_of(model, exporter.type)
        self.layers = quantized_layers(model)
        self.types = {name: exporter._type_of(name, layer) for name, layer in self.layers.items()}
        self.scales: dict[str, float] = {}
        tied = "lm_head.weight" if _config(model).tie_word_embeddings else ""
        self.dense = {name: tensor for name, tensor in dense_tensors(model) if name != tied}
        self.dense_types = {name: self._dense_type(name, tensor) for name, tensor in self.dense.items()}

    @property
    def format(self) -> str:
        return f"gguf {self._main.name}"

    @property
    def contents(self) -> str:
        quantized = sorted({each.name for each in self.types.values()})
        edges = self.dense_types.get(f"{EDGES[0]}.weight")
        what = " and ".join(quantized) or "full-precision weights"
        bits = sum(each.bits * self._weights(name) for name, each in self.types.items())
        share = f" ({bits / sum(map(self._weights, self.types)):.2f} bits a weight)" if quantized else ""
        rounded = ", scales rounded to float16" if quantized and self.exporter.scale == "block" else ""
        runtime = " for bitnet.cpp (x86) and not for llama.cpp" if self._main.name == "I2_S" else ""
        return f"{what}{share}{rounded} for the architecture {self.architecture.name}{runtime}" + (
            f", embeddings in {edges.name}" if edges else ""
        )

    @property
    def _main(self) -> TensorType:
        """The type of most weights of the blocks."""
        counts: dict[str, int] = defaultdict(int)
        for name, each in self.types.items():
            counts[each.name] += self._weights(name)
        for name, each in self.dense_types.items():
            if self.dense[name].dim() == 2 and not name.startswith(EDGES):
                counts[each.name] += self.dense[name].numel()
        return TYPES[max(counts, key=lambda name: counts[name])]

    def _weights(self, name: str) -> int:
        return _shape(self.layers[name]).numel()

    def pairs(self, record: Mapping[str, Any] | None) -> dict[str, Value]:
        """Everything but the tokenizer."""
        record = record or {}
        words = [str(record[key]) for key in ("model", "method") if record.get(key)]
        pairs = {
            "general.architecture": Value("str", self.architecture.name),
            "general.type": Value("str", "model"),
            "general.name": Value("str", " ".join(words) or type(self.model).__name__),
            "general.file_type": Value("u32", self._main.file_type),
            "general.quantization_version": Value("u32", 2),
            "bitnet_qat.version": Value("str", version("bitnet-qat")),
            KEY: Value("str", json.dumps(activation_entry(self.model))),
            **settings(self.architecture, _config(self.model)),
        }
        if (generation := generation_entry(self.model)) is not None:
            pairs[GENERATION] = Value("str", json.dumps(generation))
        if record:
            pairs[RECORD] = Value("str", json.dumps(record))
        return pairs

    def blobs(self) -> Iterator[Blob]:
        """Every tensor. A ``.scale`` follows the weight that it belongs to: its value is known then."""
        for name, kind in self.dense_types.items():
            shape = tuple(self.dense[name].shape)
            yield Blob(self._name(name), shape, kind, lambda name=name: _bytes(self.stored_dense(name)))
        for name, kind in self.types.items():
            stored = self._name(f"{name}.weight")
            yield Blob(stored, tuple(_shape(self.layers[name])), kind, lambda name=name: self._codes(name))
            if self.exporter._scale_beside(self.layers[name], kind):
                beside = stored.removesuffix("weight") + "scale"
                yield Blob(beside, (1,), TYPES["F32"], lambda name=name: _bytes(torch.tensor([self.scales[name]])))

    def stored_dense(self, name: str) -> Tensor | GGMLWeight:
        """What the file holds for a dense tensor, in llama.cpp's order of rows."""
        kind, tensor = self.dense_types[name], self.dense[name].detach().cpu()
        if kind.name == "Q8_0":
            return absmax_blocks(tensor.float(), "Q8_0")
        stored = tensor.to(DENSE[kind.name])
        if not is_finite(stored):
            raise InputError(f"{name} has values that are too large for {kind.name}: set embeddings or dense to bf16")
        return interleave(stored, self.architecture.heads(name, _config(self.model)))

    def _name(self, name: str) -> str:
        stored = self.architecture.gguf_name(name)
        assert stored is not None, f"problems() let {name} pass"
        return stored

    def _codes(self, name: str) -> Tensor:
        encoded = encode(_on_cpu(weight_of(self.layers[name])), self.types[name], self.exporter.scale)
        data = interleave(encoded.data, self.architecture.heads(name, _config(self.model)))
        if encoded.scale is not None:
            self.scales[name] = encoded.scale
            if encoded.type.tail:
                return torch.cat([data.flatten(), i2_s_tail(encoded.scale)])
        return data

    def _dense_type(self, name: str, tensor: Tensor) -> TensorType:
        if tensor.dim() != 2:
            return TYPES["F32"]
        option = self.exporter.embeddings if name.startswith(EDGES) else self.exporter.dense
        if option != "auto":
            return TYPES[option.upper()]
        return TYPES[next(each for each in NARROWEST if _holds(DENSE[each], tensor.detach()))]


def _config(model: nn.Module) -> Any:
    return model.config


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    return all(torch.equal(part.to(dtype).to(part.dtype), part) for part in values.split(PIECE))


def _is_biased(layer: nn.Module) -> bool:
    return getattr(layer, "bias", None) is not None


def _shape(layer: nn.Module) -> torch.Size:
    return layer.weight.shape  # pyright: ignore[reportReturnType]  # a parameter, or a quantized weight


def _on_cpu(weight: QuantizedWeight) -> QuantizedWeight:
    held: Any = weight
    moved = {each.name: getattr(held, each.name) for each in fields(held)}
    return replace(held, **{key: part.cpu() for key, part in moved.items() if isinstance(part, Tensor)})


def _bytes(stored: Tensor | GGMLWeight) -> Tensor:
    data = stored.data if isinstance(stored, GGMLWeight) else stored.contiguous()
    return data.view(torch.uint8)


def _these(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more layers"
