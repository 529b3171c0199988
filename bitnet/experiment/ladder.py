"""The gap ladder: how the loss of 1.58 bits above full precision falls with the size of the model.

``train.py -m +experiment=ladder`` trains a dense and a ternary model of each size on the same tokens, at several
learning rates. Of each size the best rate of both counts, of several seeds their mean, and gap(N) = a * N^-b is fitted
through their differences by least squares of the gaps themselves: what seeds and rates add to them does not shrink with
the gap, and one that comes out at zero or below counts like any other, where a line in logarithms would have to leave
it out and be too high. N is the number of weights in the linears of the blocks: those that are quantized. Intervals are
profiles of the sum of squares (Student's t, two degrees of freedom fewer than sizes), and wide for few sizes. Published
gaps stand beside the fit and are no part of it: other data, a thousand times the tokens, and N counted with embeddings.
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from bitnet.errors import InputError
from bitnet.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bitnet.report import RunRecord

# Quantiles of Student's t that hold 95 % between them, for 1, 2, ... degrees of freedom; further ones are close to 2.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
EXPONENTS = (-1.0, 4.0)  # among which a fit looks for its own
FLOOR = 1e-3  # nats: the lowest that the picture shows
PUBLISHED = (  # label, parameters, nats above 16 bits
    (
        "BitNet b1.58, 100B tokens of C4 (arXiv:2411.04965)",
        ((0.7e9, 0.074), (1.3e9, 0.041), (3e9, 0.037), (7e9, 0.004)),
    ),
    (
        "ParetoQ 1.58 bits, wiki (arXiv:2502.02631)",
        ((125e6, math.log(20.0 / 15.1)), (1e9, math.log(10.0 / 8.0))),
    ),
)


class FitLadder(Callback):
    """Hydra callback: fits the ladder of a sweep that ended without a failure."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not config.get("dry_run"):
            write_ladder(Path(config.hydra.sweep.dir))


@dataclass(frozen=True, slots=True)
class Rung:
    """One size: the best dense and the best quantized model of it."""

    weights: int  # in the linears of the blocks
    dense: float  # nats a token
    quantized: float
    dense_rate: float
    quantized_rate: float
    edge: bool  # whether a best rate is the smallest or largest tried: a better one may lie outside

    @property
    def gap(self) -> float:
        """Nats a token above full precision."""
        return self.quantized - self.dense


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """gap(N) = height * (N / pivot)^-exponent, with what it was fitted to.

    The pivot is the geometric mean of the sizes. With two sizes or fewer there are no intervals: they are None.
    """

    sizes: tuple[float, ...]
    gaps: tuple[float, ...]
    pivot: float
    height: float  # nats a token at the pivot
    exponent: float

    def gap(self, weights: float) -> float:
        """Nats a token at a size."""
        return self.height * (weights / self.pivot) ** -self.exponent

    @property
    def exponent_interval(self) -> tuple[float, float] | None:
        """Low and high of the exponent, 95 %; an end of `EXPONENTS` where the sizes set no bound."""
        if self._bound is None:
            return None
        return self._edge(EXPONENTS[0]), self._edge(EXPONENTS[1])

    def interval(self, weights: float) -> tuple[float, float] | None:
        """Low and high of the fitted gap at a size, 95 %."""
        if (bound := self._bound) is None or (ends := self.exponent_interval) is None:
            return None
        found = [self.gap(weights)]
        for step in range(201):
            exponent = ends[0] + (ends[1] - ends[0]) * step / 200
            height, squares, curvature = _profile(self.sizes, self.gaps, self.pivot, exponent)
            reach = math.sqrt(max(0.0, bound - squares) / curvature)
            found += [each * (weights / self.pivot) ** -exponent for each in (height - reach, height + reach)]
        return min(found), max(found)

    @property
    def _bound(self) -> float | None:
        """The largest sum of squares inside the interval."""
        freedom = len(self.sizes) - 2
        if freedom < 1:
            return None
        t = T_95[freedom - 1] if freedom <= len(T_95) else 2.0
        return self._squares(self.exponent) * (1 + t**2 / freedom)

    def _squares(self, exponent: float) -> float:
        return _profile(self.sizes, self.gaps, self.pivot, exponent)[1]

    def _edge(self, end: float) -> float:
        """Where the sum of squares passes its bound, between the exponent and an end of `EXPONENTS`; else that end."""
        bound, inside = self._bound, self.exponent
        assert bound is not None
        for step in range(1, 401):
            outside = self.exponent + (end - self.exponent) * step / 400
            if self._squares(outside) > bound:
                break
            inside = outside
        else:
            return end
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if self._squares(middle) > bound else (middle, outside)
        return inside


def fit_power_law(sizes: Sequence[float], gaps: Sequence[float]) -> PowerLaw:
    """Least squares of the gaps, in float64. The exponent is sought within `EXPONENTS`.

    Raises:
        InputError: fewer than two different sizes, or gaps that lie below zero on the whole.
    """
    if len(set(sizes)) < 2:
        raise InputError(f"expected gaps of at least two sizes for a fit, got {len(set(sizes))}")
    pivot = math.exp(math.fsum(map(math.log, sizes)) / len(sizes))

    def squares(exponent: float) -> float:
        return _profile(sizes, gaps, pivot, exponent)[1]

    width = (EXPONENTS[1] - EXPONENTS[0]) / 1000
    best = min((EXPONENTS[0] + width * step for step in range(1001)), key=squares)
    low, high = best - width, best + width
    for _ in range(100):  # the minimum is between its neighbours on the grid
        third = (high - low) / 3
        low, high = (low, high - third) if squares(low + third) < squares(high - third) else (low + third, high)
    exponent = min(max((low + high) / 2, EXPONENTS[0]), EXPONENTS[1])
    height = _profile(sizes, gaps, pivot, exponent)[0]
    if height <= 0:
        raise InputError(f"expected gaps above zero for a power law, got {', '.join(f'{gap:+.4f}' for gap in gaps)}")
    return PowerLaw(tuple(sizes), tuple(gaps), pivot, height, exponent)


def _profile(
    sizes: Sequence[float], gaps: Sequence[float], pivot: float, exponent: float
) -> tuple[float, float, float]:
    """The height that suits an exponent best, the sum of squares there, and how it curves with the height."""
    shape = [(size / pivot) ** -exponent for size in sizes]
    curvature = math.fsum(each * each for each in shape)
    height = math.fsum(each * gap for each, gap in zip(shape, gaps, strict=True)) / curvature
    return height, math.fsum((gap - height * each) ** 2 for each, gap in zip(shape, gaps, strict=True)), curvature


def rungs(records: "Sequence[RunRecord]") -> list[Rung]:
    """The sizes of which there is a dense and a quantized model, smallest first, the best learning rate of each.

    Raises:
        InputError: the models saw different numbers of tokens, were measured on different text, or are of two methods.
    """
    from bitnet.report.tables import is_full_precision, same_tokens

    usable = [each for each in records if each.nll is not None and each.config["size"]]
    for each in usable:
        if each.train_tokens != usable[0].train_tokens or not same_tokens(each, usable[0]):
            raise InputError(
                f"a ladder has one budget and one text: {each.method} {each.model} was trained on "
                f"{each.train_tokens:,} tokens, {usable[0].method} {usable[0].model} on {usable[0].train_tokens:,}, "
                "or they were measured on different text"
            )
    methods = {each.method for each in usable if not is_full_precision(each)}
    if len(methods) > 1:
        raise InputError(f"a ladder is of one method, got {', '.join(sorted(methods))}: sweep each of its own")
    found = []
    for weights in sorted({weights_of(each) for each in usable}):
        alike = [each for each in usable if weights_of(each) == weights]
        dense = [each for each in alike if is_full_precision(each)]
        others = [each for each in alike if not is_full_precision(each)]
        if dense and others:
            one, other = _losses(dense), _losses(others)
            rate, other_rate = min(one, key=one.__getitem__), min(other, key=other.__getitem__)
            edge = _at_the_edge(rate, one) or _at_the_edge(other_rate, other)
            found.append(Rung(weights, one[rate], other[other_rate], rate, other_rate, edge))
    return found


def weights_of(record: "RunRecord") -> int:
    """Weights in the linears of the blocks: attention's four matrices and the feed-forward's three."""
    size = record.config["size"]
    hidden, heads = size["hidden_size"], size["num_attention_heads"]
    keys = hidden * (size["num_key_value_heads"] or heads) // heads
    return size["num_hidden_layers"] * hidden * (2 * hidden + 2 * keys + 3 * size["intermediate_size"])


def write_ladder(directory: Path) -> PowerLaw:
    """Fit the runs below ``directory``; prints the table and writes ladder.md, ladder.json and ladder.png into it.

    Raises:
        InputError: fewer than two sizes, gaps that are not above zero, or runs that cannot be compared.
    """
    from bitnet.report import RunRecord

    found = rungs([RunRecord.read(path) for path in sorted(directory.glob("*/run/run.json"))])
    law = fit_power_law([each.weights for each in found], [each.gap for each in found])
    text = _markdown(found, law)
    print(text)
    with atomic_file(directory / "ladder.md") as partial:
        partial.write_text(text, encoding="utf-8")
    figures = {"pivot": law.pivot, "gap_at_pivot": law.height, "exponent": law.exponent}
    with atomic_file(directory / "ladder.json") as partial:
        partial.write_text(json.dumps({**figures, "exponent_interval": law.exponent_interval}, indent=1) + "\n")
    draw_ladder(found, law, directory / "ladder.png")
    return law


def draw_ladder(found: Sequence[Rung], law: PowerLaw, path: Path) -> None:
    """Gap over size, both logarithmic: the rungs, the fitted line with its interval, and published gaps beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bitnet.report.plots import COLOURS

    figure = Figure(figsize=(8.5, 5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots()
    sizes, gaps = [each.weights for each in found], [each.gap for each in found]
    ends = (sizes[0], max(size for _, points in PUBLISHED for size, _ in points))
    line = [ends[0] * (ends[1] / ends[0]) ** (step / 60) for step in range(61)]
    measured = [size for size in line if size <= sizes[-1]] + [sizes[-1]]
    beyond = [sizes[-1]] + [size for size in line if size > sizes[-1]]
    axes.plot(sizes, [max(gap, FLOOR) for gap in gaps], "o", color=COLOURS[0], label="measured here")
    for size, gap in zip(sizes, gaps, strict=True):
        if gap <= FLOOR:
            axes.annotate(f"{gap:+.4f}", (size, FLOOR), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.plot(measured, [law.gap(size) for size in measured], color=COLOURS[0], label=f"fit: N^-{law.exponent:.2f}")
    axes.plot(
        beyond, [law.gap(size) for size in beyond], ":", color=COLOURS[0], label="the same line, beyond what was run"
    )
    for part, alpha, label in ((measured, 0.18, "95 % of the fit"), (beyond, 0.06, None)):
        if bands := [band for size in part if (band := law.interval(size)) is not None]:
            low, high = zip(*bands, strict=True)
            axes.fill_between(
                part, [max(each, FLOOR / 2) for each in low], high, color=COLOURS[0], alpha=alpha, lw=0, label=label
            )
    for (label, points), colour, marker in zip(PUBLISHED, COLOURS[1:], "sD", strict=False):
        axes.plot(*zip(*points, strict=True), marker, mfc="none", color=colour, label=f"published: {label}")
    axes.set(xscale="log", yscale="log", xlabel="weights in quantized linears (published: all parameters)")
    axes.set_ylim(0.9 * FLOOR, 2 * max(*gaps, *(gap for _, points in PUBLISHED for _, gap in points)))
    axes.set_ylabel("gap to full precision, nats a token")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _markdown(found: Sequence[Rung], law: PowerLaw) -> str:
    lines = [
        "| weights | dense | its rate | quantized | its rate | gap |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in found:
        lines.append(
            f"| {each.weights:,} | {each.dense:.4f} | {each.dense_rate:g} | {each.quantized:.4f} | "
            f"{each.quantized_rate:g} | {each.gap:+.4f} |"
        )
    interval = law.exponent_interval
    error = "two sizes leave no interval" if interval is None else f"95 %: {_end(interval[0])} to {_end(interval[1])}"
    lines += ["", f"gap(N) = {law.height:.4f} nats * (N / {law.pivot:,.0f})^-{law.exponent:.3f} ({error})"]
    if edges := [f"{each.weights:,}" for each in found if each.edge]:
        lines += [
            "",
            f"Best rates at an edge of what was tried, so that a better one may lie outside: {', '.join(edges)}",
        ]
    return "\n".join(lines) + "\n"


def _end(exponent: float) -> str:
    beyond = dict(zip(EXPONENTS, ("below", "above"), strict=True))
    return f"{beyond[exponent]} {exponent:g}" if exponent in beyond else f"{exponent:.2f}"


def _losses(arm: "Sequence[RunRecord]") -> dict[float, float]:
    """The loss of each learning rate, the mean over its seeds."""
    losses: dict[float, list[float]] = {}
    for each in arm:
        losses.setdefault(each.config["optim"]["lr"], []).append(math.inf if each.nll is None else each.nll)
    return {rate: math.fsum(found) / len(found) for rate, found in losses.items()}


def _at_the_edge(best: float, rates: Iterable[float]) -> bool:
    tried = set(rates)
    return len(tried) > 1 and best in (min(tried), max(tried))


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m bitnet.experiment.ladder SWEEP``: fit a sweep that is there."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 1 or not Path(given[0]).is_dir():
        sys.exit("usage: python -m bitnet.experiment.ladder SWEEP, the folder of a sweep of +experiment=ladder")
    try:
        write_ladder(Path(given[0]))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
