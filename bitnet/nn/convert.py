"""Replace the linears of a model, by name: dense by trainable quantized ones, and those by frozen ones.

What is converted is decided by `plan_conversion` and nowhere else, so that what a dry run tells is what a run does.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

from torch import nn

from bitnet.errors import InputError
from bitnet.nn.bitlinear import BitLinear, BitLinear158
from bitnet.nn.linears import as_linear, is_conv1d
from bitnet.nn.quantized_linear import QuantizedLinear
from bitnet.quant import QTensor, RotatedInputs
from bitnet.quant.packed import is_packable

LayerFactory = Callable[[nn.Linear], nn.Module]

ROUTERS = ("gate", "shared_expert_gate")  # linears beside experts; `gate_proj` of a gated feed-forward is none
OTHER_SENSES = ("vision", "visual", "audio", "multi_modal_projector")  # in a part of a layer's name


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What `convert` does to a model.

    Attributes:
        converted: names of the linears that are, or are to be, quantized in training; in order.
        dense: name of every linear that stays dense -> why.
        stacked: name of every module that keeps several matrices in one tensor (experts of a mixture) -> their weights.
            They are no linears, and stay dense.
    """

    converted: tuple[str, ...]
    dense: dict[str, str]
    stacked: dict[str, int]


def convert(
    model: nn.Module,
    make: LayerFactory = BitLinear158.from_linear,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | None = None,
) -> list[str]:
    """Replace, in place, the linear layers of ``model`` by ``make(linear)``; return their names in order.

    A pattern is a shell pattern for a layer's name or for the end of it: ``q_proj``, ``layers.0.*``, ``*.mlp.*``.

    transformers' ``Conv1D`` (GPT-2), which keeps its weight as [in, out], is given to ``make`` as an ``nn.Linear`` with
    the transposed weight, a parameter of its own; formats that write dense layers turn it back.

    Args:
        model: any module; layers that are `BitLinear` already are left alone.
        make: gets the linear, returns its replacement (`BitLinear158.from_linear`, or a `functools.partial` of it; with
            ``activation=RotatedInputs(...)`` in that partial, each layer gets what its name chooses).
        include: patterns of the layers to convert.
        exclude: patterns of the layers to leave. None leaves the output head, the routers of a mixture of experts
            (``router``; ``gate`` and ``shared_expert_gate`` beside experts) and towers of other senses (``vision``,
            ``visual``, ``audio`` or ``multi_modal_projector`` in the name), where the model has any.

    Warns:
        UserWarning: experts that are kept in one tensor: they stay dense, whatever ``include`` says.

    Raises:
        InputError: a pattern that matches no linear; no linear left to convert; a weight that another module shares.
    """
    plan = plan_conversion(model, include=include, exclude=exclude)
    names = [name for name in plan.converted if not isinstance(model.get_submodule(name), BitLinear)]
    if names == [""]:
        raise InputError("a linear layer has no place to be replaced in: use BitLinear158.from_linear(layer)")
    if not names:
        raise InputError(
            f"no linear layer to convert among {len(plan.dense)} dense ones: include={list(include)}, "
            f"left out={sorted(plan.dense)}"
        )
    refuse_shared_weights(model, names)
    if plan.stacked:
        total = sum(parameter.numel() for parameter in model.parameters())
        warnings.warn(
            f"{_some(list(plan.stacked))}: experts kept in one tensor stay dense, and with them "
            f"{sum(plan.stacked.values()) / total:.0%} of the weights",
            stacklevel=2,
        )
    factories = _by_name(make, names)
    for name in names:
        model.set_submodule(name, factories[name](as_linear(model.get_submodule(name))))
    return names


def _by_name(make: LayerFactory, names: Sequence[str]) -> dict[str, LayerFactory]:
    """What makes each layer: ``make``, with the quantizer of inputs that the layer's name chooses, where one does.

    Raises:
        InputError: a pattern of the choice matches none of ``names``.
    """
    activation = getattr(make, "keywords", {}).get("activation")
    if not isinstance(activation, RotatedInputs):
        return dict.fromkeys(names, make)
    turned, factory = matching(names, activation.rotate, "activation.rotate"), cast(Any, make)
    return {
        name: partial(factory, activation=activation.rotated if name in turned else activation.plain) for name in names
    }


def plan_conversion(
    model: nn.Module, *, include: Sequence[str] = ("*",), exclude: Sequence[str] | None = None
) -> ConversionPlan:
    """What `convert` would do to ``model``, or did to it, without doing anything. See there for the arguments.

    Raises:
        InputError: a pattern that matches no linear.
    """
    linears = {name: module for name, module in model.named_modules() if _is_candidate(module)}
    chosen = matching(linears, include, "include")
    if exclude is None:
        left = _left_by_default(model, linears)
    else:
        left = dict.fromkeys(matching(linears, exclude, "exclude"), "excluded by a pattern")
    converted, dense = list[str](), dict[str, str]()
    for name, module in linears.items():
        if isinstance(module, BitLinear) or (name in chosen and name not in left):
            converted.append(name)
        else:
            dense[name] = left.get(name, "no pattern of include matches it")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in linears:
            dense[name] = f"it is a {type(module).__name__}, whose forward pass may be another"
    stacked = {name: count for name, module in model.named_modules() if (count := _stacked_weights(module))}
    return ConversionPlan(tuple(converted), dense, stacked)


def freeze(model: nn.Module) -> list[str]:
    """Replace, in place, every `BitLinear` of ``model`` by its frozen form; return their names in order.

    Raises:
        InputError: there is none, or one has a weight that is not finite (then nothing is replaced).
    """
    frozen = {name: _frozen(name, layer) for name, layer in bit_linears(model)}
    if "" in frozen:
        raise InputError("a layer has no place to be replaced in: use layer.freeze()")
    if not frozen:
        raise InputError("the model has no BitLinear to freeze: convert it first (bitnet.convert)")
    for name, layer in frozen.items():
        model.set_submodule(name, layer)
    return list(frozen)


def pack(model: nn.Module, layout: str | None = None) -> list[str]:
    """Replace, in place, every `QuantizedLinear` of ``model`` that holds ternary or sign codes by its packed form.

    Layers with other weights stay as they are. Returns the names of the packed ones, in order.

    Args:
        layout: of the ternary layers, "i2" or "t5"; None: "i2". Signs take "b1".

    Raises:
        InputError: there is none to pack, or ``layout`` is none of ternary codes.
    """
    packed: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        weight = layer.weight if isinstance(layer, QuantizedLinear) else None
        if isinstance(layer, QuantizedLinear) and isinstance(weight, QTensor) and is_packable(weight):
            packed[name] = layer.pack(layout if weight.levels == 3 else None)
    if not packed:
        raise InputError("the model has no frozen layer with ternary or sign codes to pack: freeze it first")
    for name, layer in packed.items():
        model.set_submodule(name, layer)
    return list(packed)


def bit_linears(model: nn.Module) -> list[tuple[str, BitLinear]]:
    """Names and layers of every `BitLinear` in ``model``, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BitLinear)]


def _frozen(name: str, layer: BitLinear) -> nn.Module:
    try:
        return layer.freeze()
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def matching(names: Iterable[str], patterns: Sequence[str], what: str) -> set[str]:
    """The names that a pattern matches, whole or their end.

    Raises:
        InputError: no list of patterns, or one that matches none; ``what`` names the setting it stands in.
    """
    given = cast(object, patterns)  # a string is a sequence of patterns, of one letter each
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"{what} must be a list of patterns, such as [q_proj, layers.0.*], got {given!r}")
    names = list(names)
    if patterns and not names:
        raise InputError(f"the model has no linear layers that {what} could choose from: there is nothing to quantize")
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
        if not hits:
            raise InputError(f"{what} pattern {pattern!r} matches none of the linear layers: {_some(names)}")
        found |= hits
    return found


def _is_candidate(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module) or isinstance(module, BitLinear)


def _left_by_default(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, str]:
    """Names of the linears that stay dense where no pattern is given -> why."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    found = dict[str, str]()
    for name, linear in linears.items():
        parts = name.split(".")
        if linear is head or parts[-1] == "lm_head":
            found[name] = "the output head"
        elif "router" in parts or (parts[-1] in ROUTERS and _beside_experts(model, parts)):
            found[name] = "a router: its few weights choose the experts"
        elif any(sense in part for part in parts for sense in OTHER_SENSES):
            found[name] = "it reads no text"
    return found


def _beside_experts(model: nn.Module, parts: list[str]) -> bool:
    return any("expert" in name for name, _ in model.get_submodule(".".join(parts[:-1])).named_children())


def _stacked_weights(module: nn.Module) -> int:
    """Number of weights that ``module`` keeps as several matrices in one tensor; torch's own modules have none."""
    if type(module).__module__.startswith("torch."):
        return 0
    return sum(each.numel() for each in module.parameters(recurse=False) if each.dim() == 3 and min(each.shape) > 1)


def refuse_shared_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Raise InputError for the first of the layers ``names`` whose weight another module has, too."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        shared = owners[id(model.get_submodule(name).weight)]
        if len(shared) > 1:
            raise InputError(
                f"{' and '.join(shared)} are one parameter: exclude {name!r} from the conversion, or untie them"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" ... ({len(names)} in all)" if len(names) > 6 else "")
