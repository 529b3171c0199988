"""Replace the linears of a model, by name: dense by trainable quantized ones, and those by frozen ones."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from bitnet.errors import InputError
from bitnet.nn.bitlinear import BitLinear, BitLinear158
from bitnet.nn.quantized_linear import QuantizedLinear
from bitnet.quant import QTensor
from bitnet.quant.packed import is_packable

LayerFactory = Callable[[nn.Linear], nn.Module]


def convert(
    model: nn.Module,
    make: LayerFactory = BitLinear158.from_linear,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | None = None,
) -> list[str]:
    """Replace, in place, the ``nn.Linear`` layers of ``model`` by ``make(linear)``; return their names in order.

    A pattern is a shell pattern for a layer's name or for the end of it: ``q_proj``, ``layers.0.*``, ``*.mlp.*``.

    Args:
        model: any module; layers that are `BitLinear` already are left alone.
        make: gets the linear, returns its replacement (`BitLinear158.from_linear`, or a `functools.partial` of it).
        include: patterns of the layers to convert.
        exclude: patterns of the layers to leave. None leaves the output head, where the model has one.

    Raises:
        InputError: a pattern that matches no linear; no linear left to convert; a weight that another module shares.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = matching(linears, include, "include")
    left = _heads(model, linears) if exclude is None else matching(linears, exclude, "exclude")
    names = [name for name in linears if name in chosen and name not in left]
    if names == [""]:
        raise InputError("a linear layer has no place to be replaced in: use BitLinear158.from_linear(layer)")
    if not names:
        raise InputError(
            f"no linear layer to convert among {len(linears)}: include={list(include)}, left out={sorted(left)}"
        )
    refuse_shared_weights(model, names)
    for name in names:
        model.set_submodule(name, make(linears[name]))
    return names


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
        InputError: a pattern that matches none; ``what`` names the setting it stands in.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
        if not hits:
            raise InputError(f"{what} pattern {pattern!r} matches none of the linear layers: {_some(names)}")
        found |= hits
    return found


def _heads(model: nn.Module, linears: dict[str, nn.Linear]) -> set[str]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return {name for name, linear in linears.items() if linear is head or name.split(".")[-1] == "lm_head"}


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
