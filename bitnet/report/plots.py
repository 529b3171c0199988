"""Loss curves of training runs as one picture.

Thin lines are training losses, dotted ones validation losses, and each run's name stands at the end of its line.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet.errors import InputError
from bitnet.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, str | float | None]]
Points = list[tuple[float, float]]
End = tuple[str, str, float, float]  # name, colour, step, loss

# Okabe and Ito's palette without its yellow (too pale on white): told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LABEL_GAP = 0.055  # least distance of two labels, as a share of the axis's height: one line of text


def read_metrics(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of a metrics file, or of all ``metrics.csv`` below a run's folder in the order of their names.

    A resumed run has one file for each start; of two rows for one step the later start's counts.

    Raises:
        InputError: There is no such file, or none below the folder.
    """
    path = Path(path)
    files = sorted(path.rglob("metrics.csv"), key=_start_number) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(f"expected a metrics.csv at or below {path}, found none")
    rows: list[dict[str, str]] = []
    for file in files:
        with file.open(encoding="utf-8", newline="") as lines:
            new = list(csv.DictReader(lines))
        first = min((float(row["step"]) for row in new), default=float("inf"))
        rows = [row for row in rows if float(row["step"]) < first] + new
    return rows


def training_curves(
    runs: Mapping[str, str | Path | Rows],
    path: str | Path,
    *,
    train: str | None = "train/loss",
    validation: str | None = "val/loss",
    title: str | None = None,
) -> Path:
    """Draw the loss curves of ``runs`` ({name: metrics file, run folder or rows}) to ``path`` (.png, .svg or .pdf).

    The horizontal axis is the column ``step``. One of the columns ``train`` and ``validation`` may be absent in a run;
    None leaves one out.

    Raises:
        InputError: No run, a run without a point to draw, or a file name of another kind.
    """
    from matplotlib import rc_context  # 0.5 s, and only here
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"expected a picture named .png, .svg or .pdf, got {path.name}")
    if not 1 <= len(runs) <= len(COLOURS):
        raise InputError(f"expected 1 to {len(COLOURS)} runs in one picture, got {len(runs)}")
    curves = {name: _curves(name, run, train, validation) for name, run in runs.items()}
    figure = Figure(figsize=(8, 4.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    ends = [_draw(axes, name, *curves[name], colour) for name, colour in zip(curves, COLOURS, strict=False)]
    _crop(axes, [curve for pair in curves.values() for curve in pair if curve])
    _dress(axes, title)
    _label(axes, ends)
    # Salt and no date: the same curves give the same bytes, which version control likes.
    with rc_context({"svg.hashsalt": "bitnet"}), atomic_file(path) as partial:
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[path.suffix]
        figure.savefig(partial, format=path.suffix[1:], dpi=160, metadata=undated)
    return path


def _start_number(file: Path) -> list[tuple[int, str]]:
    """version_10 after version_9."""
    return [(int(part.rpartition("_")[2]) if part.rpartition("_")[2].isdigit() else -1, part) for part in file.parts]


def _curves(name: str, run: str | Path | Rows, train: str | None, validation: str | None) -> tuple[Points, Points]:
    rows = read_metrics(run) if isinstance(run, str | Path) else run
    curves = _points(rows, train), _points(rows, validation)
    if not any(curves):
        columns = sorted({column for row in rows for column in row})
        raise InputError(f"run {name} has no value of {train} or {validation} to draw: it has the columns {columns}")
    return curves


def _points(rows: Rows, column: str | None) -> Points:
    """The (step, value) of every row that has one: a logger leaves the cells empty that it did not measure."""
    if column is None:
        return []
    found = [(row.get("step"), row.get(column)) for row in rows]
    return [(float(step), float(value)) for step, value in found if step not in (None, "") and value not in (None, "")]


def _smoothed(points: Points) -> Points:
    """A running mean over a fortieth of the run: single batches scatter more than runs differ."""
    width = max(1, len(points) // 40)
    windows = ((step, points[max(0, index - width + 1) : index + 1]) for index, (step, _) in enumerate(points))
    return [(step, sum(value for _, value in window) / len(window)) for step, window in windows]


def _draw(axes: "Axes", name: str, training: Points, validation: Points, colour: str) -> End:
    """Draw one run and return where it ends: its last validation loss, where there is one."""
    if training:
        axes.plot(*zip(*_smoothed(training), strict=True), color=colour, linewidth=1.0, alpha=0.45)
    if validation:
        axes.plot(*zip(*validation, strict=True), color=colour, linewidth=1.8, marker="o", markersize=4)
    step, loss = (validation or _smoothed(training))[-1]
    return name, colour, step, loss


def _crop(axes: "Axes", curves: list[Points]) -> None:
    """Let the first tenth of the steps leave the picture at the top.

    Every model falls by the same several nats there; on an axis of that height the tenths of a nat between models,
    which the picture is for, would be one line.
    """
    last = max(curve[-1][0] for curve in curves)
    values = [value for curve in curves for step, value in _smoothed(curve) if step >= last / 10]
    margin = 0.06 * (max(values) - min(values)) or 0.1
    axes.set_ylim(min(values) - margin, max(values) + margin)


def _dress(axes: "Axes", title: str | None) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)


def _label(axes: "Axes", ends: Iterable[End]) -> None:
    """Write each run's name and last loss to the right of the axes, moved up where two would overlap."""
    bottom, top = axes.get_ylim()
    lowest = bottom
    for name, colour, step, loss in sorted(ends, key=lambda end: end[3]):
        height = max(loss, lowest)
        lowest = height + LABEL_GAP * (top - bottom)
        axes.annotate(
            f"{name}  {loss:.3f}",
            xy=(step, loss),
            xytext=(1.015, height),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontsize=9.5,
            annotation_clip=False,
        )
