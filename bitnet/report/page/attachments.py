"""What stands beside a record in its run's folder: training curves, errors of the layers, codes, samples.

Each is bounded: a page shall open on a phone. What is there and cannot be read is noted, never left out in silence.
"""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitnet.errors import InputError
from bitnet.report.layers import place_of
from bitnet.report.page.collect import Run
from bitnet.report.page.rows import Row
from bitnet.report.plots import read_metrics

CURVES, POINTS = 24, 240  # runs with curves, and points of each
LAYERED = 40  # runs with errors of their layers
CODED = 12  # runs with their codes counted: each is a model to read
SAMPLED, LINES = 8, 24  # runs with samples, and lines of each
LARGEST = 2**31  # bytes of a packed model that is still read
BINS = 64  # codes that are counted one by one; more share bars

Read = Callable[[Path], Any]


def attachments(runs: Sequence[Run], rows: Sequence[Row], notes: list[str], *, codes: bool = True) -> dict[str, Any]:
    """Return {"curves": [...], "layers": [...], "codes": [...], "samples": [...]}, each entry with its row's ``id``.

    The first of each family come first where a bound cuts. What could not be read, and how many a bound left out, is
    added to ``notes``.
    """
    places = [(row.id, run.folder) for run, row in zip(runs, rows, strict=True) if run.folder is not None]
    places = _families_first(places, rows)
    kinds: list[tuple[str, str, Read, int]] = [
        ("curves", "csv", curves, CURVES),
        ("layers", "layers.csv", layers, LAYERED),
        ("samples", "samples.md", samples, SAMPLED),
    ]
    if codes:
        kinds.append(("codes", "packed", count_codes, CODED))
    found: dict[str, Any] = {"codes": []}
    for name, below, read, most in kinds:
        there = [(number, folder / below) for number, folder in places if (folder / below).exists()]
        entries: list[dict[str, Any]] = []
        for tried, (number, path) in enumerate(there):
            if len(entries) == most:
                left = len(there) - tried
                notes.append(f"Bounded: {name} of {most} runs are shown, {left} were not read; name fewer for others")
                break
            if entry := _tried(read, path, notes):
                entries.append({"id": number, **entry})
        found[name] = sorted(entries, key=lambda each: each["id"])
    return found


def _tried(read: Read, path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        found = read(path)
        json.dumps(found, allow_nan=False)  # refuses what is not finite
        return found
    except InputError as error:
        notes.append(f"Not read: {error}")
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        notes.append(f"Not read: {path}: {type(error).__name__}: {error}")
    return None


def _families_first(places: Sequence[tuple[int, Path]], rows: Sequence[Row]) -> list[tuple[int, Path]]:
    """The first run of every family, then the second of each, and so on."""
    turn = Counter[str]()
    order: list[tuple[int, int, Path]] = []
    for number, folder in places:
        family = rows[number].family
        order.append((turn[family], number, folder))
        turn[family] += 1
    return [(number, folder) for _, number, folder in sorted(order, key=lambda each: each[:2])]


def curves(folder: Path) -> dict[str, Any] | None:
    """Training and validation losses over tokens seen: {"train": [[x, y], ...], "validation": [...], "x": unit}."""
    metrics = read_metrics(folder)
    tokens = {row["step"]: row["train/tokens"] for row in metrics if row.get("train/tokens")}
    train = _points(metrics, "train/loss", tokens)
    validation = _points(metrics, "val/loss", tokens)
    if not train and not validation:
        return None
    return {
        "x": "tokens" if tokens else "step",
        "train": _thinned(_smoothed(train)),
        "validation": _thinned(validation),
    }


def _points(rows: Sequence[dict[str, str]], column: str, tokens: dict[str, str]) -> list[tuple[float, float]]:
    """(tokens or step, value) of every row that has one. A validation's row has no tokens: its step's are near."""
    per_step = [float(value) / float(step) for step, value in tokens.items() if float(step) > 0]
    rate = per_step[-1] if per_step else 1.0
    found = [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return [(step * rate, value) for step, value in found if math.isfinite(value)]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of the last tenth of the run at every point: single batches scatter more than runs differ."""
    width = max(1, len(points) // 10)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    ends = range(1, len(points) + 1)
    return [(points[end - 1][0], (sums[end] - sums[max(0, end - width)]) / min(end, width)) for end in ends]


def _thinned(points: Sequence[tuple[float, float]]) -> list[list[float]]:
    """At most `POINTS` of them, the last one kept."""
    every = -(-len(points) // POINTS)
    kept = [*points[:: max(every, 1)]]
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return [[round(x), round(y, 5)] for x, y in kept]


def layers(path: Path) -> dict[str, Any] | None:
    """Errors by block and kind: {"measure": "output" or "weight", "cells": [[block, kind, error, bits, name], ...]}."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines:
        return None
    measure = "output" if all(line["relative_error"] for line in lines) else "weight"
    column = {"output": "relative_error", "weight": "weight_error"}[measure]
    cells = [
        [*place_of(line["name"]), float(f"{float(line[column]):.4g}"), float(line["bits_per_weight"]), line["name"]]
        for line in lines
    ]
    return {"measure": measure, "cells": cells}


def samples(path: Path) -> dict[str, Any] | None:
    """The texts of the last step that has some: {"step": n, "texts": [...]}."""
    parts = re.split(r"^## Step (\d+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if len(parts) < 3:
        return None
    texts = [_unquoted(block) for block in parts[-1].strip("\n").split("\n\n") if block.strip()]
    return {"step": int(parts[-2]), "texts": texts}


def _unquoted(block: str) -> str:
    lines = [line.removeprefix(">").removeprefix("     ") for line in block.splitlines()]
    return "\n".join(lines if len(lines) <= LINES else [*lines[:LINES], "…"])


def count_codes(folder: Path) -> dict[str, Any] | None:
    """How often each code occurs in all layers of a packed model: {"codes": [...], "shares": [...], "weights": n}.

    None where no layer's weight is made of codes (a method may store bit planes).
    """
    from bitnet.export.packed_read import read
    from bitnet.nn.quantized_linear import QuantizedModule

    if (size := sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())) > LARGEST:
        raise InputError(f"{folder} takes {size / 1e9:.1f} GB: its codes are not counted above {LARGEST / 1e9:.1f} GB")
    counts = Counter[int]()
    for module in read(folder).model.modules():
        if isinstance(module, QuantizedModule):
            counts.update(_codes(module.weight))
    if not counts:
        return None
    total = sum(counts.values())
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // BINS)
    bars = Counter[int]()
    for code, count in counts.items():
        bars[low + (code - low) // width * width] += count
    known = list(range(low, high + 1, width))
    return {
        "codes": known,
        "shares": [round(bars[code] / total, 6) for code in known],
        "weights": total,
        "width": width,
    }


def _codes(weight: Any) -> dict[int, int]:
    from bitnet.quant import PackedTensor
    from bitnet.quant.ggml import GGMLWeight

    if isinstance(weight, PackedTensor):
        weight = weight.unpack()
    if isinstance(weight, GGMLWeight):
        codes = weight.fields().codes.flatten(-2)[..., : weight.columns]
    else:
        codes = getattr(weight, "qdata", None)
    if codes is None:
        return {}
    values, counts = codes.flatten().unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
