"""What a run's loggers get when it has its records: figures, tables, histograms, text, by the same names everywhere.

====================  =============================  =========  ===========  ===
name                  what                           W&B        TensorBoard  CSV
====================  =============================  =========  ===========  ===
result/FIGURE         of the run's last record       number     number       yes
layers/LAYER/ERROR    what quantization did to it    number     number       yes
records               a row for each record          table      text         no
layers                a row for each layer           table      text         no
samples               a row for each text and step   table      text         no
weights/LAYER         values, in units of the scale  histogram  histogram    no
codes/LAYER           codes                          histogram  histogram    no
====================  =============================  =========  ===========  ===

A table is in files of its own elsewhere: run.json, layers.csv, samples.md.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bitnet.nn import BitLinear, PackedLinear, QuantizedLinear
from bitnet.quant import PackedTensor, QTensor
from bitnet.report.record import RunRecord

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

FIGURES = (
    "claimed_bits",
    "bits_per_weight",
    "bytes",
    "nll",
    "perplexity",
    "bits_per_byte",
    "gap",
    "kl",
    "top1_agreement",
    "quantized_share",
    "train_tokens",
    "tokens_per_s",
    "quantize_seconds",
    "seconds",
)
COLUMNS = ("method", "model", *FIGURES[:8], "gap_low", "gap_high", "steps", "train_tokens", "seed", "command")
ERRORS = ("relative_error", "weight_error")  # columns of layers.csv
BINS = 64  # of a histogram of values; codes have one each up to 256

Histogram = tuple[list[int], list[float]]  # counts, and one edge more


def publish(loggers: "Sequence[Logger]", run_dir: Path, records: Sequence[RunRecord], model: nn.Module) -> None:
    """Hand the loggers what the run ended with: its records (the last one counts) and what lies beside them.

    ``model`` is the one that the last record is of, trainable or quantized.
    """
    if not records or not loggers:
        return
    step, layers = records[-1].steps, _read_layers(run_dir / "layers.csv")
    figures = result_figures(records[-1]) | _layer_figures(layers)
    for logger in loggers:
        logger.log_metrics(figures, step=step)
    tables = {
        "records": (COLUMNS, [record_row(record) for record in records]),
        "layers": (tuple(layers[0]) if layers else (), [list(row.values()) for row in layers]),
        "samples": (("step", "text"), _read_samples(run_dir / "samples.md")),
    }
    for name, (columns, rows) in tables.items():
        if rows:
            _log_table(loggers, name, columns, rows, step)
    log_histograms(loggers, model, step)


def result_figures(record: RunRecord) -> dict[str, float]:
    """The record's numbers as ``result/...``; what was not measured is left out."""
    figures = {name: getattr(record, name) for name in FIGURES}
    if record.gap_interval is not None:
        figures["gap_low"], figures["gap_high"] = record.gap_interval
    return {f"result/{name}": float(value) for name, value in figures.items() if value is not None}


def record_row(record: RunRecord) -> list[Any]:
    """The record as a row of the table ``records``: `COLUMNS`."""
    low, high = record.gap_interval or (None, None)
    known = {"gap_low": low, "gap_high": high}
    return [known[name] if name in known else getattr(record, name) for name in COLUMNS]


def log_histograms(loggers: "Sequence[Logger]", model: nn.Module, step: int) -> None:
    """Histograms of all quantized layers, for the loggers that have such a thing."""
    able = [logger for logger in loggers if _is_wandb(logger) or _is_tensorboard(logger)]
    if not able:
        return
    found = dict(_histograms(model))
    for logger in able if found else []:
        if _is_wandb(logger):
            import wandb

            made = {name: wandb.Histogram(np_histogram=cast(Any, each)) for name, each in found.items()}
            logger.experiment.log({**made, "trainer/global_step": step})  # pyright: ignore
        else:
            for name, (counts, edges) in found.items():
                _add_histogram(logger, name, counts, edges, step)


def _histograms(model: nn.Module) -> Iterator[tuple[str, Histogram]]:
    for name, layer in model.named_modules():
        weight = layer.weight.detach() if isinstance(layer, BitLinear) else None
        quantized = layer.quantized_weight() if isinstance(layer, BitLinear) else None
        if isinstance(layer, PackedLinear):
            quantized = cast(PackedTensor, layer.weight).unpack()
        elif isinstance(layer, QuantizedLinear):
            quantized = layer.weight
        if isinstance(quantized, QTensor):
            yield f"codes/{name}", _code_histogram(quantized.qdata)
        if weight is not None and isinstance(quantized, QTensor):
            yield f"weights/{name}", _value_histogram(weight / quantized.per_column(quantized.scale.float()))


def _code_histogram(codes: Tensor) -> Histogram:
    values = codes.flatten().int()
    low = int(values.min())
    counts = torch.bincount(values - low).tolist()
    return counts, [low - 0.5 + place for place in range(len(counts) + 1)]


def _value_histogram(values: Tensor) -> Histogram:
    """All but the tails beyond 4 standard deviations, which are in the outermost bins."""
    values = values.float().flatten()
    reach = max(4 * float(values.std(correction=0)), 1e-6)
    counts = torch.histc(values.clamp(-reach, reach), BINS, -reach, reach)
    return [int(count) for count in counts], torch.linspace(-reach, reach, BINS + 1).tolist()


def _add_histogram(logger: Any, name: str, counts: list[int], edges: list[float], step: int) -> None:
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    pairs = list(zip(middles, counts, strict=True))
    logger.experiment.add_histogram_raw(
        name,
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(value * count for value, count in pairs),
        sum_squares=sum(value * value * count for value, count in pairs),
        bucket_limits=edges[1:],
        bucket_counts=counts,
        global_step=step,
    )


def _log_table(
    loggers: "Sequence[Logger]", name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    for logger in loggers:
        if _is_wandb(logger):
            import wandb

            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            logger.experiment.log({name: table, "trainer/global_step": step})  # pyright: ignore
        elif _is_tensorboard(logger):
            logger.experiment.add_text(name, _markdown(columns, rows), step)  # pyright: ignore


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    """One cell of a Markdown table, whatever a text holds."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", "<br>")


def _read_layers(path: Path) -> list[dict[str, Any]]:
    """Rows of layers.csv, numbers as numbers; none where nothing was quantized after its training."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {key: value if key == "name" else float(value) if value else None for key, value in row.items()} for row in rows
    ]


def _layer_figures(layers: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        f"layers/{row['name']}/{error}": row[error] for row in layers for error in ERRORS if row.get(error) is not None
    }


def _read_samples(path: Path) -> list[tuple[int, str]]:
    """(step, text) of every text in samples.md; none where the run wrote none."""
    if not path.exists():
        return []
    parts = re.split(r"^## Step (\d+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = list[tuple[int, str]]()
    for step, blocks in zip(parts[1::2], parts[2::2], strict=True):
        for block in re.split(r"\n\n+", blocks.strip("\n")):
            lines = [line.removeprefix(">").removeprefix("     ") for line in block.splitlines()]
            found.append((int(step), "\n".join(lines)))
    return found


def _is_wandb(logger: "Logger") -> bool:
    from lightning.pytorch.loggers import WandbLogger

    return isinstance(logger, WandbLogger)


def _is_tensorboard(logger: "Logger") -> bool:
    from lightning.pytorch.loggers import TensorBoardLogger

    return isinstance(logger, TensorBoardLogger)
