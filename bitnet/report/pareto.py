"""Quality against size as one picture: the loss above full precision, over the bits that a weight really takes.

The gap is drawn on a logarithmic axis, because 4 bits cost thousandths of a nat and 2 bits tenths; below its smallest
power of ten the axis is linear down to full precision, which is a line at zero. Perplexities stand on the right.
"""

import math
import re
from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bitnet.errors import InputError
from bitnet.files import atomic_file
from bitnet.report.plots import COLOURS
from bitnet.report.record import RunRecord
from bitnet.report.tables import gap_of, is_full_precision, same_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.ticker import NullLocator
    from matplotlib.transforms import Bbox

MARKERS = "osD^vPX"
FINEST, COARSEST = 1e-4, 1e-1  # nats: where the axis may turn linear
TICKS = (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 32)
ANGLES = (0, 90, 270, 180, 45, 315, 135, 225, 20, 340, 160, 200, 70, 110, 250, 290)  # degrees, the best place first
RADII = (9, 16, 26, 40, 58, 80)  # points


class Point(NamedTuple):
    """One quantized model: its label, family, bits a weight, and height (nats of gap, or perplexity)."""

    label: str
    family: str
    bits: float
    height: float


def pareto(records: Sequence[RunRecord], path: str | Path, *, title: str | None = None) -> Path:
    """Draw quantized models as points, gap or perplexity over true bits per weight, to ``path`` (.png, .svg or .pdf).

    The front joins the models that no other one beats in both. Models that are still latent are left out: they weigh 32
    bits and answer as their frozen form. Where a gap is unknown, perplexity is the height of all.

    Raises:
        InputError: No quantized model to draw, records of different tokens, or a file name of another kind.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"expected a picture named .png, .svg or .pdf, got {path.name}")
    points, full, by_gap = _points(records)
    figure = Figure(figsize=(9, 5.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # measures labels
    axes = figure.subplots()
    _draw(axes, points)
    _scale(axes, points, full, by_gap)
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    figure.draw_without_rendering()  # settles the layout, so that labels can be placed in it
    figure.set_layout_engine("none")
    _label(axes, points)
    with rc_context({"svg.hashsalt": "bitnet"}), atomic_file(path) as partial:
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[path.suffix]
        figure.savefig(partial, format=path.suffix[1:], dpi=160, metadata=undated)
    return path


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: fewer bits at no more height, or less height at no more bits; by bits."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.height)):
        if not best or point.height < best[-1].height:
            best.append(point)
    return best


def _points(records: Sequence[RunRecord]) -> tuple[list[Point], float | None, bool]:
    """The points, the perplexity of full precision where it is known, and whether heights are gaps."""
    measured = [record for record in records if record.perplexity is not None]
    shown = [each for each in measured if not is_full_precision(each) and not each.method.endswith(" latent")]
    if not shown:
        raise InputError("expected at least one quantized model with a perplexity to draw, got none")
    if odd := next((record for record in measured if not same_tokens(record, shown[0])), None):
        raise InputError(
            f"{odd.method} and {shown[0].method} were evaluated on different tokens or windows: draw them apart"
        )
    gaps = [gap_of(record, records) for record in shown]
    by_gap = all(gap is not None for gap in gaps)
    heights = gaps if by_gap else [record.perplexity for record in shown]
    points = [
        Point(record.method, _family(record), record.bits_per_weight, float(height or 0.0))
        for record, height in zip(shown, heights, strict=True)
    ]
    full = next((record.perplexity for record in measured if is_full_precision(record)), None)
    if by_gap and shown[0].nll is not None:  # what the gaps are to, and no control that was trained on
        full = math.exp(shown[0].nll - points[0].height)
    return points, full, by_gap


def _family(record: RunRecord) -> str:
    """The class of the post-training method, or the first word of the label: "b1.58" of "b1.58 frozen"."""
    ptq = record.config.get("ptq")
    if isinstance(ptq, dict) and "_target_" in ptq:
        return str(ptq["_target_"]).rpartition(".")[2]
    return re.split(r"[\s,:;-]", record.method)[0]


def _colours(points: Sequence[Point]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each family; the second round of colours has other markers."""
    families = list(dict.fromkeys(point.family for point in points))
    looks = [(COLOURS[index], MARKERS[(index + round) % len(MARKERS)]) for round, index in product(range(7), range(7))]
    return dict(zip(families, cycle(looks), strict=False))


def _draw(axes: "Axes", points: Sequence[Point]) -> None:
    best = front(points)
    axes.plot(
        [point.bits for point in best],
        [point.height for point in best],
        color="#bbbbbb",
        linewidth=1.4,
        drawstyle="steps-post",
        zorder=1,
    )
    looks = _colours(points)
    for point in points:
        colour, marker = looks[point.family]
        axes.plot(point.bits, point.height, marker=marker, color=colour, markersize=6.5, linestyle="none", zorder=3)


def _scale(axes: "Axes", points: Sequence[Point], full: float | None, by_gap: bool) -> None:
    low, high = min(point.bits for point in points), max(point.bits for point in points)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    axes.set_xticks([tick for tick in TICKS if low / 1.25 <= tick <= high * 1.25])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(_no_ticks())
    axes.set_xlabel("bits per quantized weight, every stored bit counted")
    if by_gap:
        _gap_axis(axes, [point.height for point in points], full)
    else:
        axes.set_ylabel("perplexity")
    if by_gap or full is not None:
        _full_precision_line(axes, 0.0 if by_gap or full is None else full, full)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def _full_precision_line(axes: "Axes", height: float, perplexity: float | None) -> None:
    axes.axhline(height, color="#000000", linewidth=1.0, zorder=1)
    axes.annotate(
        "full precision" if perplexity is None else f"full precision, perplexity {perplexity:.2f}",
        xy=(0, height),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=8.5,
    )


def _no_ticks() -> "NullLocator":
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _gap_axis(axes: "Axes", gaps: Sequence[float], full: float | None) -> None:
    smallest = min((abs(gap) for gap in gaps if gap), default=FINEST)
    threshold = min(max(10.0 ** math.floor(math.log10(smallest)), FINEST), COARSEST)
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
    top = max(max(gaps), threshold)
    bottom = min(0.0, *gaps)
    axes.set_ylim(bottom * 1.6 if bottom < 0 else -threshold / 6, top * 1.7)
    decades = [10.0**power for power in range(round(math.log10(threshold)), math.ceil(math.log10(top)) + 1)]
    ticks = [
        tick for tick in [step * decade for decade in decades for step in (1, 3)] if threshold <= tick <= top * 1.7
    ]
    signed = [-tick for tick in ticks if -tick >= bottom] + [0.0, *ticks]
    axes.set_yticks(signed, [f"{tick:g}" for tick in signed])
    axes.yaxis.set_minor_locator(_no_ticks())
    axes.set_ylabel("loss above full precision, nats per token")
    if full is not None:
        right = axes.twinx()
        right.set_yscale("symlog", linthresh=threshold, linscale=0.5)
        right.set_ylim(axes.get_ylim())
        right.set_yticks(signed, [f"{full * math.exp(tick):.4g}" for tick in signed])
        right.yaxis.set_minor_locator(_no_ticks())
        right.set_ylabel("perplexity")
        right.spines[["top", "right"]].set_visible(False)


def _label(axes: "Axes", points: Sequence[Point]) -> None:
    """Write each label at the nearest place around its point where it covers no other label and no point."""
    looks = _colours(points)
    pixels = axes.transData.transform([(point.bits, point.height) for point in points])
    taken: list[Bbox] = [_box_around(x, y) for x, y in pixels]
    taken += [text.get_window_extent() for text in axes.texts]
    for index in sorted(range(len(points)), key=lambda index: (points[index].bits, -points[index].height)):
        others = [other for place, other in enumerate(taken) if place != index]
        taken.append(_place(axes, points[index], looks[points[index].family][0], others))


def _place(axes: "Axes", point: Point, colour: str, others: Sequence["Bbox"]) -> "Bbox":
    """Write one label and return its extent; where no place is free it stands in the first one."""
    for radius, angle in product(RADII, ANGLES):
        note = _note(axes, point, colour, radius, angle)
        box = _extent(note)
        if _inside(box, axes.bbox) and not any(box.overlaps(other) for other in others):
            return box
        note.remove()
    return _extent(_note(axes, point, colour, RADII[0], ANGLES[0]))


def _note(axes: "Axes", point: Point, colour: str, radius: float, angle: float) -> "Annotation":
    from matplotlib.patheffects import withStroke

    dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return axes.annotate(
        point.label,
        xy=(point.bits, point.height),
        xytext=(radius * dx, radius * dy),
        textcoords="offset points",
        ha="center" if abs(dx) < 0.4 else "left" if dx > 0 else "right",
        va="center" if abs(dy) < 0.4 else "bottom" if dy > 0 else "top",
        fontsize=8.5,
        color=colour,
        zorder=4,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],  # legible over the front
        arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6} if radius > RADII[1] else None,
    )


def _extent(note: "Annotation") -> "Bbox":
    """Of the words alone: an annotation's own extent takes its leader in, and with it half the picture."""
    from matplotlib.text import Text

    note.get_window_extent()  # places it
    return Text.get_window_extent(note)


def _box_around(x: float, y: float, half: float = 6.0) -> "Bbox":
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _inside(box: "Bbox", whole: "Bbox") -> bool:
    return box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1
