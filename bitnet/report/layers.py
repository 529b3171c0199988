"""What quantization did to each layer: a table, a file for other programs, and a picture of blocks and layer kinds."""

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bitnet.errors import InputError
from bitnet.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CSV_COLUMNS = ("name", "out_features", "in_features", "bits_per_weight", "relative_error", "weight_error", "seconds")
LEGEND = (
    "output error: squared error of the layer's outputs on the calibration text, as a share of their square; weight "
    "error: the same of the weights; seconds: of the method alone."
)
UNKNOWN = "—"


class LayerRow(Protocol):
    """One quantized layer, with W its weight, D what quantization changed, H the second moment of its inputs."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]:
        """out, in"""
        ...

    @property
    def bits_per_weight(self) -> float: ...
    @property
    def relative_error(self) -> float | None:
        """tr(D H D^T) / tr(W H W^T); None without calibration"""
        ...

    @property
    def weight_error(self) -> float:
        """||D||^2 / ||W||^2"""
        ...

    @property
    def seconds(self) -> float: ...


def layers_markdown(rows: Sequence[LayerRow]) -> str:
    """Return a Markdown table, one line a layer, in the order given.

    Raises:
        InputError: There is no row.
    """
    _check(rows)
    headings = ["layer", "shape", "bits/weight", "output error", "weight error", "seconds"]
    table = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    table += [
        [
            f"`{row.name}`",
            f"{row.shape[0]}x{row.shape[1]}",
            f"{row.bits_per_weight:.3f}",
            UNKNOWN if row.relative_error is None else f"{row.relative_error:.3g}",
            f"{row.weight_error:.3g}",
            f"{row.seconds:.2f}",
        ]
        for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in table) + f"\n{LEGEND}\n"


def write_layers_csv(rows: Sequence[LayerRow], path: str | Path) -> Path:
    """Write the rows with all their digits; an error that was not measured is an empty cell.

    Raises:
        InputError: There is no row.
    """
    _check(rows)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for row in rows:
            error = "" if row.relative_error is None else row.relative_error
            writer.writerow([row.name, *row.shape, row.bits_per_weight, error, row.weight_error, row.seconds])
    return Path(path)


def layers_picture(rows: Sequence[LayerRow], path: str | Path, *, title: str | None = None) -> Path:
    """Draw the error of every layer, blocks across and layer kinds down, to ``path`` (.png, .svg or .pdf).

    The colour is the output error or, where a row has none, the weight error of all. Darker is worse, on a logarithmic
    scale; a layer without any error (an all-zero weight) stays white.

    Raises:
        InputError: There is no row, two rows of one name, or a file name of another kind.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"expected a picture named .png, .svg or .pdf, got {path.name}")
    _check(rows)
    measured = all(row.relative_error is not None for row in rows)
    cells = {place_of(row.name): (row.relative_error if measured else row.weight_error) or 0.0 for row in rows}
    if len(cells) < len(rows):
        raise InputError("expected each layer once, got two rows with one block and kind")
    blocks = sorted({block for block, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    figure = Figure(
        figsize=(2.6 + 0.55 * max(len(blocks), 4), 1.5 + 0.4 * len(kinds)), layout="constrained", facecolor="white"
    )
    axes = figure.subplots()
    _heat(axes, cells, blocks, kinds)
    axes.set_title(title or f"{'output' if measured else 'weight'} error", loc="left", fontsize=11)
    with rc_context({"svg.hashsalt": "bitnet"}), atomic_file(path) as partial:
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[path.suffix]
        figure.savefig(partial, format=path.suffix[1:], dpi=160, metadata=undated)
    return path


def place_of(name: str) -> tuple[int, str]:
    """Block and kind of a layer: (3, "self_attn.q_proj") of "model.layers.3.self_attn.q_proj".

    A mixture's experts keep their number in the kind. A layer outside the blocks has block -1 and its name as kind.
    """
    found = re.match(r"(?:.*?\.)?(\d+)\.(.+)$", name)
    return (-1, name) if found is None else (int(found[1]), found[2])


def _heat(axes: "Axes", cells: dict[tuple[int, str], float], blocks: Sequence[int], kinds: Sequence[str]) -> None:
    errors = [[cells.get((block, kind), 0.0) for block in blocks] for kind in kinds]
    logs = [[math.log10(error) if error > 0 else math.nan for error in line] for line in errors]
    known = [log for line in logs for log in line if not math.isnan(log)] or [0.0]
    low, high = min(known), max(known)
    # At least a decade from light to dark: differences of a few per cent shall not look like a catastrophe.
    axes.imshow(logs, cmap="Blues", vmin=min(low, high - 1) - 0.2, vmax=high + 0.4, aspect="auto")
    for down, line in enumerate(errors):
        for across, error in enumerate(line):
            if error > 0:
                dark = math.log10(error) > (min(low, high - 1) + high + 0.2) / 2 + 0.2
                text = f"{error:.0e}".replace("e-0", "e-") if error < 0.001 else f"{error:.2g}"
                axes.text(
                    across, down, text, ha="center", va="center", fontsize=7, color="#ffffff" if dark else "#222222"
                )
    axes.set_xticks(range(len(blocks)), ["other" if block < 0 else str(block) for block in blocks])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _check(rows: Sequence[LayerRow]) -> None:
    if not rows:
        raise InputError("expected at least one quantized layer to report, got none")
