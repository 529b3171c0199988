"""What converting a model will do to it, before it is done: what becomes quantized, what does not, and why.

A dry run of ``train.py`` prints it. Types, shapes and names are looked at only, so a model on the meta device will do.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitnet.nn import plan_conversion
from bitnet.nn.linears import is_linear, weight_of

SUPER_BLOCK = 256  # weights of a row that GGUF's ternary and k-quant types take together


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What is converted in one model; names are those of its modules.

    Attributes:
        shapes: name of every linear that is, or will be, quantized -> [out, in] of its weight.
        dense: name of every linear that stays dense -> why.
        stacked: name of every module with experts in one tensor, which stay dense -> their number of weights.
        biases: those of the converted linears that have a bias; it stays float32 and is added after the rescaling.
        tied: names of parameters that are one, first that which a file keeps.
        norms: names of all norms; those of queries and keys and SubLN are among them.
        head_dim: width of an attention head, None where the config tells none.
        parameters: all weights of the model, tied ones once.
    """

    shapes: dict[str, tuple[int, int]]
    dense: dict[str, str]
    stacked: dict[str, int]
    biases: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    norms: tuple[str, ...]
    head_dim: int | None
    parameters: int

    @property
    def quantized_share(self) -> float:
        """Share of all weights that are, or will be, quantized."""
        return sum(rows * columns for rows, columns in self.shapes.values()) / self.parameters

    def rows(self) -> dict[str, str]:
        """The report as a table of two columns; layers that differ in their numbers only are one entry."""
        shaped = [f"{name} {list(shape)}" for name, shape in self.shapes.items()]
        reasons = [f"{name} ({reason})" for name, reason in self.dense.items()]
        stacked = [f"{name} ({count:,} weights in one tensor)" for name, count in self.stacked.items()]
        total = len(self.shapes) + len(self.dense)
        found = {
            f"converted: {len(self.shapes)} of {total} linears, {self.quantized_share:.0%} of the weights": alike(
                shaped
            ),
            "left dense": alike(reasons),
            "experts left dense": alike(stacked),
            "biases (float32, added after rescaling)": alike(self.biases),
            "tied": "; ".join(" = ".join(names) for names in self.tied),
            "norms (untouched)": alike(self.norms),
            "head dimension": "" if self.head_dim is None else str(self.head_dim),
            f"rows of no multiple of {SUPER_BLOCK} weights": ", ".join(map(str, self._uneven())),
        }
        return {name: text for name, text in found.items() if text}

    def _uneven(self) -> list[int]:
        return sorted({columns for _, columns in self.shapes.values() if columns % SUPER_BLOCK})


def diagnose_conversion(
    model: nn.Module, *, include: Sequence[str] = ("*",), exclude: Sequence[str] | None = None
) -> ConversionReport:
    """The report on a model that is to be converted with these patterns, or was; see `bitnet.convert` for them.

    Raises:
        InputError: a pattern that matches no linear.
    """
    plan = plan_conversion(model, include=include, exclude=exclude)
    layers = {name: model.get_submodule(name) for name in plan.converted}
    # A converted layer is no `is_linear` any more: it is an nn.Linear with a forward pass of its own.
    shapes = {name: _shape(layer) for name, layer in layers.items()}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return ConversionReport(
        shapes=shapes,
        dense=plan.dense,
        stacked=plan.stacked,
        biases=tuple(name for name, layer in layers.items() if getattr(layer, "bias", None) is not None),
        tied=tuple(tuple(names) for names in owners.values() if len(names) > 1),
        norms=tuple(name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()),
        head_dim=_head_dim(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def alike(names: Iterable[str]) -> str:
    """Names in one line, those that differ in the numbers between their dots once: ``layers.*.q_proj (6 times)``."""
    counted = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in counted.items())


def _shape(layer: nn.Module) -> tuple[int, int]:
    rows, columns = weight_of(layer).shape if is_linear(layer) else layer.weight.shape  # pyright: ignore
    return int(rows), int(columns)


def _head_dim(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    config = config.get_text_config()
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (width // heads if width and heads else None)
