"""What a Hugging Face folder has to pass before it gets its name: read by this package, and loaded by transformers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export import hf_bitnet
from bitnet.export.hf_read import read
from bitnet.export.parity import (
    SAME_ARITHMETIC,
    compare_codes,
    compare_logits,
    dense_tensors,
    difference,
    logits,
    plain_values,
    quantized_layers,
    token_ids,
    weight_of,
)
from bitnet.export.protocol import ExportError
from bitnet.nn import BitLinear, QuantizedEmbedding, QuantizedLinear
from bitnet.nn.linears import is_conv1d
from bitnet.quant import QTensor, QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Root mean square of the logits' difference, as a share of their spread over the vocabulary.
SAME_QUANTIZERS = (
    0.25  # rounding that differs next to boundaries: see `bitnet.export.hf`. The exact checks go before it
)
SIXTEEN_BITS = 0.5  # transformers then rounds scales (0.4 %) and sums to 16 bits: 0.22 in an untrained b1.58 Llama
PACKED = tuple(hf_bitnet.SCALE_ROUNDING)


def check(folder: Path, model: "PreTrainedModel", kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Read ``folder`` both ways and compare; return the figures of `bitnet.export.Exported`.

    Raises:
        ExportError: a tensor is missing, left over or differs in a bit; a layer is not quantized; the logits differ.
    """
    import transformers

    with transformers_at_hand():
        ids = token_ids(model)
        expected = logits(model, ids)
        figures: dict[str, Any] = {"layers": 0, "difference": 0.0}
        tolerance = SAME_ARITHMETIC if dtype == model.dtype == torch.float32 else SAME_QUANTIZERS
        if kind == "latent" or kind in PACKED:
            figures = _with_this_package(folder, model, kind, expected, ids, tolerance)
        found = _with_transformers(folder, model, kind, dtype, ids)
        if kind == "dense":
            distance = compare_logits(expected, found, tolerance, "by transformers")
        elif kind == "dequantized":
            with _values_only(model):
                compare_logits(logits(model, ids), found, tolerance, "by transformers, activations not quantized,")
            distance = difference(expected, found)
        else:
            allowed = SAME_QUANTIZERS if dtype == torch.float32 else SIXTEEN_BITS
            distance = compare_logits(expected, found, allowed, "with transformers' layers")
    if kind in ("dense", "dequantized"):
        figures["difference"] = distance
    return {**figures, "runtime": f"transformers {transformers.__version__}", "runtime_difference": distance}


def _with_this_package(
    folder: Path, model: "PreTrainedModel", kind: str, expected: Tensor, ids: Tensor, tolerance: float
) -> dict[str, Any]:
    """Codes and scales, every other tensor, and the logits; the latter once more with the scales before rounding."""
    try:
        loaded: Any = read(folder).model
    except InputError as error:
        raise ExportError(f"what was written does not read back: {error}") from error
    loaded.to(model.device)
    loaded.set_attn_implementation(model.config._attn_implementation)
    rounding = hf_bitnet.SCALE_ROUNDING.get(kind, 0.0)
    compare_dense(model, loaded, folder, None)
    distance = difference(expected, logits(loaded, ids)) if rounding else 0.0
    layers = _compare_rounded_scales(model, loaded, rounding) if rounding else compare_codes(model, loaded)
    found = compare_logits(expected, logits(loaded, ids), tolerance, "with this package's layers")
    return {"layers": layers, "difference": distance if rounding else found}


def _compare_rounded_scales(model: nn.Module, loaded: nn.Module, rounding: float) -> int:
    """Compare codes bit for bit and scales within ``rounding``; leave the scales of ``model`` in ``loaded``."""
    expected, found = quantized_layers(model), quantized_layers(loaded)
    if names := sorted(expected.keys() ^ found.keys()):
        raise ExportError(f"other layers are quantized in what was read back: {', '.join(names[:3])}")
    for name, layer in expected.items():
        weight, read_back = _codes(weight_of(layer)), _codes(weight_of(found[name]))
        scale = weight.scale.float().reshape(1, 1)
        near = bool((read_back.scale - scale).abs() <= rounding * scale)
        if not near or not torch.equal(weight.qdata, read_back.qdata):
            raise ExportError(f"{name}: the codes or the scale read back are not those that were written")
        found[name].weight_scale = scale.clone()
    return len(expected)


def _with_transformers(folder: Path, model: "PreTrainedModel", kind: str, dtype: torch.dtype, ids: Tensor) -> Tensor:
    """Logits of the folder as its user will load it, its tensors compared."""
    from transformers import AutoModelForCausalLM

    model_and_report: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        attn_implementation=model.config._attn_implementation,
    )
    loaded, report = model_and_report
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[problem])):
            raise ExportError(f"transformers reads {folder} with {problem.replace('_', ' ')}: {keys[:3]}")
    loaded.to(model.device)
    compare_dense(model, loaded, folder, dtype)
    _compare_classes(model, loaded, kind)
    for name, layer in quantized_layers(model).items():
        if not _holds(loaded.get_submodule(name), layer, kind, dtype):
            raise ExportError(f"transformers reads other values of {name} than were written")
    return logits(loaded, ids)


def compare_dense(written: nn.Module, loaded: nn.Module, folder: Path, dtype: torch.dtype | None) -> None:
    """Compare every tensor of no quantized weight; ``dtype`` is what it must be in, None: any that holds the value."""
    found = loaded.state_dict()
    for name, tensor in dense_tensors(written):
        meant = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        if name not in found:
            raise ExportError(f"what was read back from {folder} lacks {name}: transformers has no place for it")
        same = found[name].dtype == meant.dtype if dtype is not None else True
        if dtype is None and tensor.is_floating_point():
            meant = meant.to(_stored_dtype(folder)).to(found[name].dtype)
        if not same or not torch.equal(found[name], meant):
            raise ExportError(f"other values of {name} are read back than were written")


def _stored_dtype(folder: Path) -> torch.dtype:
    from bitnet.models.pretrained import stored_dtype

    return stored_dtype(folder)


def _compare_classes(written: nn.Module, loaded: nn.Module, kind: str) -> None:
    """Whether transformers quantizes the layers that were written so, and with the class meant for them."""
    integration = import_module("transformers.integrations.bitnet")
    classes = {name: type(layer) for name, layer in loaded.named_modules()}
    found = {name for name, each in classes.items() if each in (integration.AutoBitLinear, integration.BitLinear)}
    meant = integration.BitLinear if kind == "bitlinear" else integration.AutoBitLinear
    expected = quantized_layers(written).keys() if kind == "latent" or kind in PACKED else set[str]()
    wrong = sorted(found ^ expected) or [name for name in found if classes[name] is not meant]
    if wrong:
        raise ExportError(f"transformers quantizes other layers than were quantized here: {wrong[:3]}")


def _holds(found: Any, layer: nn.Module, kind: str, dtype: torch.dtype) -> bool:
    """Whether transformers' layer ``found`` has what was written for ``layer``."""
    if kind == "latent":
        assert isinstance(layer, BitLinear)
        return torch.equal(found.weight, layer.weight.to(dtype))
    if kind == "dequantized":
        values = plain_values(layer, dtype)
        return torch.equal(found.weight.t() if is_conv1d(found) else found.weight, values)
    weight = _codes(weight_of(layer))
    codes = hf_bitnet.unpack_rows(found.weight) if kind == "bitlinear" else found.weight
    scale = hf_bitnet.stored_scale(weight.scale, kind).to(found.weight_scale.dtype)
    return torch.equal(codes, weight.qdata.to(codes.dtype)) and torch.equal(found.weight_scale, scale)


@contextmanager
def transformers_at_hand() -> Iterator[None]:
    """Let transformers load and run BitNet layers in this process, and without its bars; all as before afterwards.

    It compiles those layers when they first run, which takes a C++ compiler.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler uses what torch has deprecated
        import_module("transformers.integrations.bitnet")
    with quiet_transformers(), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the bars and remarks of transformers; as before afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _values_only(model: nn.Module) -> Iterator[None]:
    """``model`` with inputs that are not quantized, its weights dequantized one at a time; as before afterwards."""
    layers = {
        name: layer for name, layer in quantized_layers(model).items() if not isinstance(layer, QuantizedEmbedding)
    }
    for name, layer in layers.items():
        model.set_submodule(name, _Values(layer))
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


class _Values(nn.Module):
    """A quantized layer without the quantization of its inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        if isinstance(layer, QuantizedLinear) and layer.activation is None:
            return layer(x)
        bias: Tensor | None = layer.bias
        return F.linear(x, plain_values(layer, x.dtype), None if bias is None else bias.to(x.dtype))


def _codes(weight: QuantizedWeight) -> QTensor:
    assert isinstance(weight, QTensor)
    return weight
