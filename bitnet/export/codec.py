"""Quantized weights and quantizers of inputs as tensors and plain values, and back: what files of our own hold.

Reading builds nothing but what this module names: a weight is one of this package's dataclasses, a quantizer one of its
functions. Codes are stored in as many bits as they need, scales and zero points as they are.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant import (
    FixedRange,
    PackedTensor,
    QTensor,
    QuantizedWeight,
    Quantizer,
    absmax,
    absmax_b1,
    absmean_int4,
    pack,
    unpack,
    zero_point,
)
from bitnet.quant.packed import is_packable

QUANTIZERS = {  # of inputs, by name
    "absmax": absmax,
    "absmax_b1": absmax_b1,
    "absmean_int4": absmean_int4,
    "zero_point": zero_point,
}
ODD_CODES = "o2"  # layout of -3, -1, +1, +3
HOMES = ("bitnet.quant.", "bitnet.ptq.")  # modules whose dataclasses may be named


@dataclass(frozen=True, slots=True)
class Stored:
    """Something taken apart: ``entry`` is json, ``tensors`` are by field."""

    entry: dict[str, Any]
    tensors: dict[str, Tensor]


def store_weight(weight: QuantizedWeight, layout: str) -> Stored:
    """Take a weight apart. ``layout`` ("i2" or "t5") is that of ternary codes."""
    if isinstance(weight, QTensor):
        if is_packable(weight):
            weight = PackedTensor.of(weight, layout if weight.levels == 3 else None)
        else:
            return _store_codes(weight, layout)
    elif isinstance(weight, PackedTensor) and weight.layout != layout and weight.layout != "b1":
        weight = PackedTensor.of(weight.unpack(), layout)
    parts = {each.name: getattr(weight, each.name) for each in fields(weight)}  # pyright: ignore[reportArgumentType]
    name = "PackedTensor" if isinstance(weight, PackedTensor) else _name(type(weight))
    plain = {key: part for key, part in parts.items() if not isinstance(part, Tensor)}
    return Stored({"class": name, **plain}, {key: part for key, part in parts.items() if isinstance(part, Tensor)})


def restore_weight(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Put a weight together.

    Raises:
        InputError: an unknown type, a tensor too many or too few, or values that the type refuses.
    """
    plain = dict(entry)
    name = plain.pop("class", None)
    if name == "QTensor":
        return _restore_codes(plain, tensors)
    kind = PackedTensor if name == "PackedTensor" else _named(name, "dequantize")
    _expect_fields(kind, {*plain, *tensors})
    try:
        return kind(**tensors, **plain)
    except (TypeError, ValueError) as error:
        raise InputError(f"a {name} cannot be made from what the file holds: {error}") from error


def store_activation(activation: Quantizer | None) -> Stored | None:
    """Take a quantizer of inputs apart.

    Raises:
        InputError: it is none of this package's, so that no file can name it.
    """
    if activation is None:
        return None
    if isinstance(activation, FixedRange):
        tensors = {"scale": activation.scale, "zero_point": activation.zero_point}
        held = {key: each for key, each in tensors.items() if each is not None}
        return Stored({"class": "FixedRange", "levels": activation.levels}, held)
    if is_dataclass(activation) and not isinstance(activation, type) and type(activation).__module__.startswith(HOMES):
        plain = {each.name: getattr(activation, each.name) for each in fields(activation)}
        return Stored({"class": _name(type(activation)), **plain}, {})
    function, options = activation, {}
    if isinstance(activation, partial) and not activation.args:
        function, options = activation.func, dict(activation.keywords)
    name = next((name for name, each in QUANTIZERS.items() if each is function), None)
    if name is None:
        raise InputError(
            f"the inputs are quantized by {activation!r}, which no file can name: use one of {', '.join(QUANTIZERS)}"
        )
    return Stored({"class": name, **options}, {})


def restore_activation(entry: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Quantizer | None:
    """Put a quantizer of inputs together.

    Raises:
        InputError: an unknown type or option.
    """
    if entry is None:
        return None
    options = dict(entry)
    name = options.pop("class", None)
    try:
        if name == "FixedRange":
            return FixedRange(options.pop("levels"), tensors["scale"], tensors.get("zero_point"))
        if name in QUANTIZERS:
            quantizer = partial(QUANTIZERS[name], **options) if options else QUANTIZERS[name]
            signature(QUANTIZERS[name]).bind(torch.empty(0), **options)
            quantizer(torch.zeros(1, 1))  # refuses values of options
            return quantizer
        kind = _named(name, "__call__")
        _expect_fields(kind, set(options))
        return kind(**options)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"no quantizer of inputs can be made from {dict(entry)}: {error}") from error


def _store_codes(weight: QTensor, layout: str) -> Stored:
    """A `QTensor` with its codes and zero points packed."""
    form = {2: "b1", 3: layout}.get(weight.levels, f"u{max(2, (weight.levels - 1).bit_length())}")
    if weight.odd:
        form = ODD_CODES
    tensors = {"codes": pack(weight.qdata, form), "scale": weight.scale}
    if weight.zero_point is not None:
        tensors["zero_point"] = pack(weight.zero_point, form)
    entry = {"class": "QTensor", "layout": form, "levels": weight.levels, "group_size": weight.group_size}
    return Stored({**entry, "columns": weight.shape[-1]}, tensors)


def _restore_codes(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QTensor:
    if plain.keys() != {"layout", "levels", "group_size", "columns"} or not {"codes", "scale"} <= tensors.keys():
        raise InputError(f"a QTensor has layout, levels, group_size, columns, codes and scale; got {sorted(plain)}")
    levels, size, columns = plain["levels"], plain["group_size"], plain["columns"]
    rows, groups = tensors["codes"].shape[0], 1 if size is None else -(-columns // size)
    if tensors["scale"].dim() != 2 or tensors["scale"].shape[0] not in (1, rows) or tensors["scale"].shape[1] != groups:
        raise InputError(f"scale must be [1 or {rows}, {groups}], got {list(tensors['scale'].shape)}")
    qdata, zero = unpack(tensors["codes"], plain["layout"], columns), None
    if "zero_point" in tensors:
        zero = unpack(tensors["zero_point"], plain["layout"], groups)
    odd = plain["layout"] == ODD_CODES  # the layout holds no others: they need no check
    low, high = (1 - levels, levels - 1) if levels == 2 or odd else (-(levels // 2), (levels - 1) // 2)
    for codes in (qdata, zero):
        if codes is not None and codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
            raise InputError(f"codes of {levels} levels lie between {low} and {high}: the file is damaged")
    return QTensor(qdata, tensors["scale"], levels, zero, size, odd)


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _named(name: Any, method: str) -> Any:
    """One of this package's dataclasses, by module and name; importing these modules does nothing else."""
    module, _, qualified = str(name).partition(":")
    if module.startswith(HOMES) and qualified.isidentifier():
        try:
            kind = getattr(import_module(module), qualified, None)
        except ImportError:
            kind = None
        if isinstance(kind, type) and is_dataclass(kind) and hasattr(kind, method):
            return kind
    raise InputError(
        f"the file names the type {name!r}, which this version does not have: was it written by a newer one?"
    )


def _expect_fields(kind: Any, found: set[str]) -> None:
    known = {each.name: each for each in fields(kind)}
    needed = {key for key, each in known.items() if each.default is MISSING and each.default_factory is MISSING}
    if wrong := sorted((found - known.keys()) | (needed - found)):
        raise InputError(f"{kind.__name__} has the fields {', '.join(known)}; too many or missing: {', '.join(wrong)}")
