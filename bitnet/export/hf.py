"""A Hugging Face folder: config, safetensors, tokenizer and model card, which transformers loads by itself.

What the weights file holds (``weights``):

dense            a model without quantized layers: its weights.
latent           BitNet b1.58 as transformers has it (one absmean scale a matrix, int8 absmax a token): the latent
                 weights, which its ``AutoBitLinear`` quantizes in every forward pass. W1.58A8, and can be trained on.
bitlinear        four ternary codes a byte and 1/m; transformers' ``BitLinear`` unpacks them in every forward pass.
autobitlinear    the same bytes and m; transformers' ``AutoBitLinear`` unpacks them into float32 when it loads them.
dequantized      the values that the codes of any quantized model stand for, in dense layers. The weights are exact; the
                 activations, where the model quantizes them, are not quantized. Weights of turned inputs
                 (`bitnet.quant.Rotated`) are turned back in float32, which rounds.

Bytes, and which of the two scales goes where: `bitnet.export.hf_bitnet`. Reading: `bitnet.export.hf_read`.

Nothing is handed over unread: while the folder still has a temporary name, it is read by this package (codes equal bit
for bit, every other tensor too) and loaded by transformers (the same tensors again; its logits are compared).

transformers quantizes with ``round(x * (1 / scale))`` where this package has ``round(x / scale)``, so now and then a
value next to a rounding boundary gets the neighbouring code: 2 of 2.3e8 weights and 33 of 2.5e7 activations in random
models. Such a flip is amplified from layer to layer, up to the level of the rounding noise itself: the logits of random
models differ by 0.002 (2 layers, hidden 64), 0.019 (6, 256) and 0.042 (12, 768) of their spread. Leaving the
activations unquantized makes 0.012, 0.038 and 0.064, leaving out the quantizers altogether about 1.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export import hf_bitnet
from bitnet.export.card import loading_code, model_card
from bitnet.export.hf_gate import check
from bitnet.export.hf_read import read
from bitnet.export.packed_problems import body_problems, tokenizer_problems
from bitnet.export.parity import (
    dense_tensors,
    plain_values,
    quantized_layers,
    refuse_non_finite,
    size_of,
    weight_of,
)
from bitnet.export.protocol import Exported, refuse_problems
from bitnet.export.tensorfile import header_room, write_tensors
from bitnet.files import atomic_directory
from bitnet.models.build import DEQUANTIZED
from bitnet.models.generation_config import write_generation
from bitnet.nn import BitLinear
from bitnet.nn.linears import is_conv1d
from bitnet.quant import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HuggingFaceExporter", "contents", "read"]

WEIGHTS = ("auto", "latent", "bitlinear", "autobitlinear", "dequantized")
PACKED = ("bitlinear", "autobitlinear")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CONTENTS = {
    "dense": "full-precision weights",
    "latent": "latent weights, quantized as they are used: 1.58-bit weights and 8-bit activations (W1.58A8)",
    "bitlinear": "packed ternary weights, 2 bits each, and 8-bit activations (W1.58A8), unpacked as they are used",
    "autobitlinear": "packed ternary weights, 2 bits each, and 8-bit activations (W1.58A8), unpacked when loaded",
    "dequantized": "exact values of the quantized weights in dense layers; activations are not quantized here",
}
COMPILES = (
    "transformers asks for `accelerate` when it loads this (`pip install accelerate`), and compiles its BitNet layers: "
    "without a C++ compiler on the machine set `TORCH_COMPILE_DISABLE=1`."
)
NOTES = {
    "dense": [],
    "latent": [COMPILES],
    "bitlinear": [COMPILES, "For inference only: transformers cannot train these layers."],
    "autobitlinear": [
        COMPILES,
        "transformers unpacks the weights into the dtype of the model when it loads them, and cannot save it again.",
    ],
    "dequantized": [
        "The weights are codes times scales already: quantizing them again would shrink the scale.",
        "A model whose activations were quantized answers a little differently here, where they are not.",
    ],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceExporter:
    """Writes what ``AutoModelForCausalLM.from_pretrained`` loads. See the module's docstring.

    Args:
        weights: what the file holds. "auto": "dense" or, for a quantized model, "latent" where transformers computes
            the same, else "dequantized".
        dtype: of everything but packed codes and their scales: "float32"; "bfloat16" and "float16" round it (and what
            transformers then computes with).

    Raises:
        InputError: options that do not exist.
    """

    weights: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, value, choices in (("weights", self.weights, WEIGHTS), ("dtype", self.dtype, tuple(DTYPES))):
            if value not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

    @property
    def filename(self) -> str:
        return "hf" if self.weights == "auto" else f"hf-{self.weights}"

    def problems(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[str]:
        """See `bitnet.export.Exporter`."""
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            return [f"expected a transformers model to write for Hugging Face, got {type(model).__name__}"]
        layers = quantized_layers(model)
        if self.weights != "auto" and not layers:
            return ["no layer is quantized: use weights=auto, which writes it as it is"]
        others = [] if tokenizer is None else tokenizer_problems(model, tokenizer)
        return (body_problems(model) or self._misfits(model, layers)) + others

    def _misfits(self, model: "PreTrainedModel", layers: dict[str, nn.Module]) -> list[str]:
        """Why what the file would hold for ``layers`` is not what they are."""
        if self.weights in PACKED:
            return hf_bitnet.packed_problems(layers, plain_body(model), self.weights)
        if self._kind(model) != "latent":
            return []
        found = hf_bitnet.latent_problems(layers)
        if transposed := _conv1d(model, layers):
            found.append(
                f"{transposed[0]} and {len(transposed) - 1} more are Conv1D, transformers quantizes nn.Linear only: "
                "use weights=dequantized"
            )
        dtype = DTYPES[self.dtype]
        if any(_loses(layer, dtype) for layer in layers.values()):
            found.append(
                f"latent weights rounded to {self.dtype} have other codes: use dtype=float32, or weights=bitlinear"
            )
        return found

    def write(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase | None",
        path: str | Path,
        record: Mapping[str, Any] | None = None,
    ) -> Exported:
        """Write the folder ``path``. See `bitnet.export.Exporter`.

        Beside the model there is one layer in memory while writing and comparing; transformers itself, which loads the
        folder at the end, needs memory for the whole model.
        """
        refuse_problems(self.problems(model, tokenizer), f"a Hugging Face folder (weights={self.weights})")
        written: Any = model  # problems() has seen that it is transformers'
        refuse_non_finite(model)
        kind = self._kind(written)
        with atomic_directory(path) as folder:
            write_tensors(folder / "model.safetensors", *stored(written, kind, DTYPES[self.dtype]))
            _write_config(written, kind, self.dtype, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            holds = CONTENTS[kind] + ("" if self.dtype == "float32" else f"; the rest rounded to {self.dtype}")
            card = model_card(holds, code=loading_code(), notes=NOTES[kind], tags=_tags(kind), record=record)
            (folder / "README.md").write_text(card, encoding="utf-8")
            checked = check(folder, written, kind, DTYPES[self.dtype])
            size = size_of(folder)
        return Exported(path=Path(path), format=f"hf {kind}", contents=holds, bytes=size, **checked)

    def _kind(self, model: "PreTrainedModel") -> str:
        return contents(model) if self.weights == "auto" else self.weights


def contents(model: "PreTrainedModel") -> str:
    """Return what ``weights=auto`` makes of ``model``: dense, latent, bitlinear (frozen) or dequantized."""
    layers = quantized_layers(model)
    if not layers:
        return "dense"
    if all(hf_bitnet.is_b158(layer) for layer in layers.values()) and not _conv1d(model, layers):
        return "latent"
    frozen = not any(isinstance(layer, BitLinear) for layer in layers.values())
    fits = frozen and not hf_bitnet.packed_problems(layers, plain_body(model), "bitlinear")
    return "bitlinear" if fits else "dequantized"


def stored(model: "PreTrainedModel", kind: str, dtype: torch.dtype) -> tuple[Iterator[tuple[str, Tensor]], int]:
    """The tensors of the file in order, made as they are taken, and the bytes that its header needs."""
    layers = quantized_layers(model)
    names = [name for name, _ in dense_tensors(model)]
    names += [f"{name}.{part}" for name in layers for part in ("weight", "weight_scale")]
    return _stored(model, layers, kind, dtype), header_room(names)


def _stored(
    model: "PreTrainedModel", layers: dict[str, nn.Module], kind: str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    plain = plain_body(model)
    yield from stored_dense(model, plain, dtype)
    for name, layer in layers.items():
        if kind == "latent":
            assert isinstance(layer, BitLinear)
            yield f"{name}.weight", layer.weight.detach().to(dtype)
            continue
        if kind == "dequantized":
            values = plain_values(layer, dtype)
            yield f"{name}.weight", values.t().contiguous() if is_conv1d(plain.get_submodule(name)) else values
        else:
            weight = weight_of(layer)
            assert isinstance(weight, QTensor)
            yield f"{name}.weight", hf_bitnet.pack_rows(weight.qdata)
            yield f"{name}.weight_scale", hf_bitnet.stored_scale(weight.scale, kind)


def stored_dense(
    model: "PreTrainedModel", plain: "PreTrainedModel", dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of no quantized weight in ``dtype``; one that two names share once, if the config ties these names.

    A reader ties what the config says: what was tied by hand is stored under both names.
    """
    tied = plain.all_tied_weights_keys
    seen = set[int]()
    saved = model.state_dict(keep_vars=True)
    for name, tensor in dense_tensors(model):
        if id(saved[name]) in seen and name in tied | {source: name for name, source in tied.items()}:
            continue
        seen.add(id(saved[name]))
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def plain_body(model: "PreTrainedModel") -> "PreTrainedModel":
    """transformers' own model of the same configuration, without memory."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _write_config(model: "PreTrainedModel", kind: str, dtype: str, folder: Path) -> None:
    """config.json and generation_config.json.

    The entry ``quantization_config`` makes transformers quantize: without it latent weights load as a dense model, and
    nothing is raised.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    if kind == "dequantized":
        setattr(config, DEQUANTIZED, True)
    config.save_pretrained(folder)
    if kind == "latent" or kind in PACKED:
        _declare(folder / "config.json", kind, hf_bitnet.left_dense(model))
    write_generation(model, folder)


def _declare(config_file: Path, kind: str, left_dense: list[str]) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    linear_class, mode = ("autobitlinear", "online") if kind == "latent" else (kind, "offline")
    config["quantization_config"] = hf_bitnet.config_entry(linear_class, mode, left_dense)
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _conv1d(model: Any, layers: Iterable[str]) -> list[str]:
    """Those of ``layers`` that transformers builds as ``Conv1D`` (GPT-2)."""
    plain = plain_body(model)
    return [name for name in layers if is_conv1d(plain.get_submodule(name))]


def _loses(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the latent weight of ``layer`` has values that ``dtype`` does not hold."""
    return isinstance(layer, BitLinear) and torch.promote_types(dtype, layer.weight.dtype) != dtype


def _tags(kind: str) -> list[str]:
    return ["1.58-bit"] if kind == "latent" or kind in PACKED else []
