"""GPTQ checkpoints: what GPTQModel, transformers with optimum, vLLM and AutoGPTQ load, of `bitnet.ptq` and of training.

Codes, zero points and float16 scales are stored as they are; the layout is drawn in `bitnet.export.gptq_layout`. The
columns stand in their own order (act-order with static groups stores nothing more), so ``desc_act`` is false whatever
order they were quantized in.

The folder is read back by this package: codes, scales and zero points have to be equal, every other tensor too, and
the logits. The runtimes named above compute in 16 bits; `docs/export.md` says what they were measured to answer.
"""

import copy
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export.card import loading_code, model_card
from bitnet.export.gptq_layout import BITS, BLOCK, FORMATS, bits_of, to_tensors, unsigned_zeros
from bitnet.export.gptq_read import PARTS
from bitnet.export.hf import DTYPES, plain_body, stored_dense
from bitnet.export.hf_bitnet import grouped_by_reason, left_dense
from bitnet.export.hf_gate import SAME_QUANTIZERS, compare_dense, quiet_transformers
from bitnet.export.hf_read import read
from bitnet.export.packed_problems import body_problems, tokenizer_problems
from bitnet.export.parity import (
    SAME_ARITHMETIC,
    compare_logits,
    dense_tensors,
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
from bitnet.models.generation_config import write_generation
from bitnet.nn import BitLinear, QuantizedEmbedding, QuantizedLinear, QuantizedModule
from bitnet.quant import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["GPTQExporter", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQExporter:
    """Writes a GPTQ checkpoint. See the module's docstring.

    Args:
        checkpoint_format: how zero points are stored: "gptq" (less 1, what every runtime reads), "gptq_v2" (as they
            are); "auto" takes "gptq" unless a zero point is 0, which that cannot hold.
        dtype: of embeddings, norms, biases and head: "float16" (what the kernels compute in), "bfloat16", "float32".

    Raises:
        InputError: options that do not exist.
    """

    checkpoint_format: str = "auto"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        choices = {"checkpoint_format": ("auto", *FORMATS), "dtype": tuple(DTYPES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @property
    def filename(self) -> str:
        return "gptq"

    def problems(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[str]:
        """See `bitnet.export.Exporter`."""
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            return [f"expected a transformers model to write as a GPTQ checkpoint, got {type(model).__name__}"]
        layers = quantized_layers(model)
        if not layers:
            return ["no layer is quantized: quantize it first (ptq=gptq), or use export=hf"]
        others = [] if tokenizer is None else tokenizer_problems(model, tokenizer)
        return (body_problems(model) or self._misfits(model, layers)) + others

    def _misfits(self, model: "PreTrainedModel", layers: dict[str, nn.Module]) -> list[str]:
        """Why the format cannot hold ``layers``."""
        plain, head = plain_body(model), model.get_output_embeddings()
        found = grouped_by_reason(
            {
                name: [HEAD] if layer is head else _reasons(layer, plain.get_submodule(name))
                for name, layer in layers.items()
            }
        )
        return found or _mixture(layers)

    def write(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase | None",
        path: str | Path,
        record: Mapping[str, Any] | None = None,
    ) -> Exported:
        """Write the folder ``path``, and print a line saying what it holds. See `bitnet.export.Exporter`.

        Raises:
            InputError: also for a zero point of 0 where ``checkpoint_format`` is "gptq".
        """
        refuse_problems(self.problems(model, tokenizer), "a GPTQ checkpoint")
        refuse_non_finite(model)
        body = cast("PreTrainedModel", model)
        entry = self._entry(body, record or {})
        dtype = DTYPES[self.dtype]
        with atomic_directory(path) as folder:
            write_tensors(folder / "model.safetensors", _stored(body, entry, dtype), header_room(_names(body)))
            _write_config(body, entry, self.dtype, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            size_name = "a row" if entry["group_size"] == -1 else f"{entry['group_size']} columns"
            holds = f"{entry['bits']}-bit weights with a scale for {size_name} (GPTQ format), the rest {self.dtype}"
            (folder / "README.md").write_text(_card(holds, entry, record), encoding="utf-8")
            layers, distance = _check(folder, body, dtype)
            size = size_of(folder)
        form = f"{entry['checkpoint_format']} {entry['bits']} bits"
        return Exported(path=Path(path), format=form, contents=holds, bytes=size, layers=layers, difference=distance)

    def _entry(self, model: "PreTrainedModel", record: Mapping[str, Any]) -> dict[str, Any]:
        """``quantization_config``."""
        weights = {name: _codes(layer) for name, layer in quantized_layers(model).items()}
        bits = max(bits_of(weight) for weight in weights.values())
        size = next(iter(weights.values())).group_size
        touching = [name for name, weight in weights.items() if int(unsigned_zeros(weight, bits).min()) == 0]
        form = self.checkpoint_format
        if form == "gptq" and touching:
            raise InputError(
                f"{touching[0]} has a zero point of 0, which checkpoint_format=gptq (zero points less 1) cannot hold: "
                "use checkpoint_format=gptq_v2, or quantize with symmetric=true"
            )
        settings = (record.get("config") or {}).get("ptq") or {}
        entry: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": -1 if size is None else size,
            "desc_act": False,
            "sym": all(weight.zero_point is None for weight in weights.values()),
            "damp_percent": settings.get("damping", 0.01),
            "true_sequential": True,
            "lm_head": False,
            "checkpoint_format": ("gptq_v2" if touching else "gptq") if form == "auto" else form,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["bitnet"]},
        }
        head = model.get_output_embeddings()
        dense = [name for name in left_dense(model) if model.get_submodule(name) is not head]
        if (
            dense
        ):  # a loader must not look for packed tensors there: the first entry is GPTQModel's, the second optimum's
            entry["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in dense}
            if inside := _same_in_every_block(weights):
                entry["modules_in_block_to_quantize"] = [inside]
        return entry


HEAD = "runtimes do not load a packed head: leave it dense (driver.head=false)"


def _reasons(layer: nn.Module, plain: nn.Module) -> list[str]:
    """Why the format cannot hold ``layer``, in the place of transformers' ``plain``."""
    if isinstance(layer, QuantizedEmbedding) or not isinstance(plain, nn.Linear):
        return [f"it is a {type(plain).__name__}, the format packs nn.Linear only: leave it dense"]
    assert isinstance(layer, BitLinear | QuantizedModule)
    weight, found = layer.quantized_weight() if isinstance(layer, BitLinear) else layer.weight, list[str]()
    trained = not isinstance(layer, QuantizedLinear)
    if trained and (not isinstance(weight, QTensor) or weight.levels <= 3):
        return ["it has ternary or sign codes of its own training: use export=packed, hf or gguf"]
    if not isinstance(weight, QTensor) or weight.levels > 2 ** max(BITS):
        return [
            f"its weight is a {type(weight).__name__}: only codes on a uniform grid of whole zero points fit "
            "(ptq=absmax, zeropoint, gptq or gptq_refined)"
        ]
    if weight.odd:
        return ["its codes are odd numbers around 0, the format's whole steps around a zero point: use export=packed"]
    if getattr(layer, "activation", None) is not None:
        found.append("its inputs are quantized, which the format does not describe: use export=packed or hf")
    if weight.scale.dtype != torch.float16:
        found.append(
            f"its scales are {str(weight.scale.dtype).removeprefix('torch.')} and the format's float16, so that every "
            "value would change: quantize with scale_dtype=float16"
        )
    for name, size in (("in_features", plain.in_features), ("out_features", plain.out_features)):
        if size % BLOCK:
            found.append(f"{name} must be a multiple of {BLOCK}, got {size}: leave the layer dense (driver.exclude)")
    if weight.group_size is not None and plain.in_features % weight.group_size:
        found.append(
            f"in_features must be a multiple of the group size, got {plain.in_features} and {weight.group_size}: "
            "choose granularity=row or a size that divides it"
        )
    return found


def _mixture(layers: dict[str, nn.Module]) -> list[str]:
    kinds = {(bits_of(weight), weight.group_size) for weight in map(_codes, layers.values())}
    if len(kinds) == 1:
        return []
    said = ", ".join(f"{bits} bits with {'rows' if size is None else f'groups of {size}'}" for bits, size in kinds)
    return [f"one checkpoint has one number of bits and one group size, got {said}: quantize all layers alike"]


def _same_in_every_block(names: Iterable[str]) -> list[str] | None:
    """The names that the quantized layers have inside their block, None where the blocks differ."""
    blocks = defaultdict[str, list[str]](list)
    for name in names:
        found = re.fullmatch(r"(.*?\.\d+)\.(.+)", name)
        if found is None:
            return None
        blocks[found[1]].append(found[2])
    first, *others = blocks.values()
    return first if all(each == first for each in others) else None


def _codes(layer: nn.Module) -> QTensor:
    weight = weight_of(layer)
    assert isinstance(weight, QTensor)
    return weight


def _names(model: "PreTrainedModel") -> list[str]:
    """Every name in the file."""
    layers = [f"{name}.{part}" for name in quantized_layers(model) for part in PARTS]
    return layers + [name for name, _ in dense_tensors(model)]


def _stored(model: "PreTrainedModel", entry: Mapping[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    yield from stored_dense(model, plain_body(model), dtype)
    for name, layer in quantized_layers(model).items():
        tensors = to_tensors(_codes(layer), entry["bits"], entry["checkpoint_format"])
        yield from ((f"{name}.{part}", getattr(tensors, part)) for part in PARTS)


def _write_config(model: "PreTrainedModel", entry: Mapping[str, Any], dtype: str, folder: Path) -> None:
    """config.json, quantize_config.json (what AutoGPTQ reads) and generation_config.json."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    file = folder / "config.json"
    values = {**json.loads(file.read_text(encoding="utf-8")), "quantization_config": entry}
    for path, content in ((file, values), (folder / "quantize_config.json", entry)):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_generation(model, folder)


def _card(holds: str, entry: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    notes = ["For inference only; the weights hold codes, and quantizing them again loses."]
    if entry["checkpoint_format"] == "gptq_v2":
        notes.append("Zero points are stored as they are (`gptq_v2`): a loader must know this format.")
    if "dynamic" in entry:
        known = "`dynamic`" + (" or `modules_in_block_to_quantize`" if "modules_in_block_to_quantize" in entry else "")
        notes.append(f"Some linears are dense: a loader must know the entry {known} of the config.")
    prelude = ["# pip install gptqmodel optimum; vLLM loads the folder by itself"]
    return model_card(holds, code=loading_code(prelude), notes=notes, tags=["gptq"], record=record)


def _check(folder: Path, model: "PreTrainedModel", dtype: torch.dtype) -> tuple[int, float]:
    """Read the folder, compare; the number of layers and the logits' difference.

    Raises:
        ExportError: it is not the model.
    """
    with quiet_transformers():
        try:
            loaded: Any = read(folder).model
        except InputError as error:
            raise ExportError(f"what was written does not read back: {error}") from error
        loaded.to(model.device).set_attn_implementation(model.config._attn_implementation)
        layers = _compare_codes(model, loaded)
        compare_dense(model, loaded, folder, None)
        ids = token_ids(model)
        tolerance = SAME_ARITHMETIC if dtype == model.dtype == torch.float32 else SAME_QUANTIZERS
        distance = compare_logits(logits(model, ids), logits(loaded, ids), tolerance, "by this package")
    return layers, distance


def _compare_codes(model: nn.Module, loaded: nn.Module) -> int:
    """Compare codes, scales and zero points of every row and group; return the number of layers.

    A scale for the whole matrix comes back as one for each row, and zero points that are all 2^(bits-1) as none.
    """
    expected, found = quantized_layers(model), quantized_layers(loaded)
    if names := sorted(expected.keys() ^ found.keys()):
        raise ExportError(f"other layers are quantized in what was read back: {', '.join(names[:3])}")
    for name, layer in expected.items():
        one, other = _codes(layer), _codes(found[name])
        same = torch.equal(one.qdata, other.qdata) and torch.equal(one.scale.expand_as(other.scale), other.scale)
        if not same or not torch.equal(unsigned_zeros(one, 8), unsigned_zeros(other, 8)):
            raise ExportError(f"{name}: the codes, scales or zero points read back are not those that were written")
    return len(expected)
