"""Results side by side: the same rows for the terminal (Rich) and for a document (Markdown)."""

from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bitnet.errors import InputError
from bitnet.report.record import RunRecord

SAME_TEXT = ("name", "corpus_hash", "tokenizer_hash")
SAME_BLOCKS = ("block_size", "validation_blocks", "isolate_documents")
DENSE = "dense"  # RunRecord.method of a full-precision twin
FULL_PRECISION = (DENSE, "full precision", "hf")
PACKED = {"text": "packed"}  # the protocol of records that name none
LEGEND = (
    "loss: nats a token of the validation text; gap: to the full-precision model; bits/weight: of the linear layers, "
    "every stored bit counted; MB: the whole model, embeddings included."
)
MORE_LEGEND = {
    "gap ±": "±: half the 95 % interval of the gap, windows of text resampled",
    "share": "share: of all parameters that are quantized",
    "claimed": "claimed: the bits that the method goes by",
    "KL": "KL: divergence of the predictions from the full-precision model's, nats a token",
    "top-1": "top-1: tokens for which both models hold the same one for the likeliest",
    "quantize s": "quantize s: seconds of quantization, calibration included",
}
OPTIONAL = {  # columns that are there where a record has the field
    "gap ±": "gap_interval",
    "KL": "kl",
    "top-1": "top1_agreement",
    "claimed": "claimed_bits",
    "share": "quantized_share",
    "quantize s": "quantize_seconds",
}
LEAST_MISSED = (
    "quantize s",
    "share",
    "bits/byte",
    "top-1",
    "KL",
    "claimed",
    "gap ±",
)  # first to go where a terminal is narrow
UNKNOWN = "—"


Cell = Callable[[RunRecord, Sequence[RunRecord]], str]


def results_table(records: Sequence[RunRecord], *, title: str | None = None, width: int | None = None) -> Table:
    """Return a Rich table, one row a record: losses and gaps in nats per token, MB of 10^6 bytes.

    The gap is the one measured beside the full-precision model or, where a record has none, the difference to the
    first full-precision row of the same model on the same tokens. It stays empty where there is neither: losses on
    different texts, tokens or windows cannot be subtracted. Figures that no record has get no column, and the least
    missed ones none where the table would be wider than ``width`` characters.

    Raises:
        InputError: There is no record.
    """
    columns = _fitting(_columns(records), records, width)
    table = Table(
        title=title,
        title_justify="left",
        caption=_legend(columns),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, heading in enumerate(columns):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for record in records:
        table.add_row(*(cell(record, records) for cell in columns.values()))
    return table


def terminal() -> Console:
    """Where results are printed: as wide as the terminal; on a pipe as wide as a table with all its columns."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=150)


def results_markdown(records: Sequence[RunRecord]) -> str:
    """Return the rows of `results_table` as a Markdown table."""
    columns = _columns(records)
    rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    rows += [[cell(record, records) for cell in columns.values()] for record in records]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\n{_legend(columns)}\n"


def is_full_precision(record: RunRecord) -> bool:
    """Whether the record is of a model in which nothing is quantized; words after the name (a sweep's) are allowed."""
    return any(record.method == name or record.method.startswith(f"{name} ") for name in FULL_PRECISION)


def gap_of(record: RunRecord, records: Sequence[RunRecord]) -> float | None:
    """Nats per token above full precision: as measured, or to the first such record of the same model and tokens."""
    if record.gap is not None:
        return record.gap
    if is_full_precision(record) or record.nll is None:
        return None
    alike = [each for each in records if is_full_precision(each) and each.model == record.model]
    twin = next((each for each in alike if same_tokens(each, record)), None)
    return None if twin is None or twin.nll is None else record.nll - twin.nll


def same_tokens(one: RunRecord, other: RunRecord) -> bool:
    """Whether two losses are of the same tokens, each predicted from the same ones before it."""
    protocol = one.evaluation or PACKED
    keys = SAME_TEXT + SAME_BLOCKS if protocol.get("text") == PACKED["text"] else SAME_TEXT
    return protocol == (other.evaluation or PACKED) and all(one.data.get(key) == other.data.get(key) for key in keys)


def _columns(records: Sequence[RunRecord]) -> dict[str, Cell]:
    if not records:
        raise InputError("expected at least one run record for a table, got none")

    def figure(name: str, format_spec: str) -> Cell:
        return lambda record, _: _number(getattr(record, name), format_spec)

    columns: dict[str, Cell] = {
        "method": lambda record, _: record.method,
        "loss": figure("nll", ".4f"),
        "gap": lambda record, all_of_them: _number(gap_of(record, all_of_them), "+.4f"),
        "gap ±": lambda record, _: _number(_half_width(record.gap_interval), ".4f"),
        "KL": figure("kl", ".4f"),
        "top-1": figure("top1_agreement", ".1%"),
        "perplexity": figure("perplexity", ".2f"),
        "bits/byte": figure("bits_per_byte", ".4f"),
        "claimed": figure("claimed_bits", ".2f"),
        "bits/weight": figure("bits_per_weight", ".3f"),
        "share": figure("quantized_share", ".0%"),
        "MB": lambda record, _: _number(record.bytes / 1e6, ".2f"),
        "quantize s": figure("quantize_seconds", ".1f"),
    }
    absent = [heading for heading, name in OPTIONAL.items() if all(getattr(record, name) is None for record in records)]
    return {heading: cell for heading, cell in columns.items() if heading not in absent}


def _fitting(columns: dict[str, Cell], records: Sequence[RunRecord], width: int | None) -> dict[str, Cell]:
    """``columns``, less the least missed of them until a table of them is no wider than ``width``."""
    kept = dict(columns)
    for heading in LEAST_MISSED:
        widths = [max(len(name), *(len(cell(each, records)) for each in records)) for name, cell in kept.items()]
        if width is None or sum(widths) + len(widths) + 1 <= width:
            break
        kept.pop(heading, None)
    return kept


def _legend(columns: Iterable[str]) -> str:
    more = [MORE_LEGEND[heading] for heading in columns if heading in MORE_LEGEND]
    return LEGEND if not more else "; ".join([LEGEND.removesuffix("."), *more]) + "."


def _half_width(interval: Sequence[float] | None) -> float | None:
    return None if interval is None else (interval[1] - interval[0]) / 2


def _number(value: float | None, format_spec: str) -> str:
    return UNKNOWN if value is None else format(value, format_spec)
