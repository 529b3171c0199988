"""Results side by side: the same rows for the terminal (Rich) and for a document (Markdown)."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bitnet.errors import InputError
from bitnet.report.record import RunRecord

SAME_TOKENS = ("name", "corpus_hash", "tokenizer_hash", "block_size", "validation_blocks", "isolate_documents")
DENSE = "dense"  # RunRecord.method of a full-precision twin
HEADINGS = ("method", "loss", "gap", "perplexity", "bits/byte", "bits/weight", "MB")
LEGEND = (
    "loss: nats a token of the validation text; gap: to the dense twin; bits/weight: of the linear layers, every "
    "stored bit counted; MB: the whole model, embeddings included."
)
UNKNOWN = "—"


def results_table(records: Sequence[RunRecord], *, title: str | None = None) -> Table:
    """Return a Rich table, one row a record: losses and gaps in nats per token, MB of 10^6 bytes.

    The gap is to the dense row on the same data; it stays empty where there is none, because losses on different texts
    or tokens cannot be subtracted.

    Raises:
        InputError: There is no record.
    """
    rows = _rows(records)
    table = Table(
        title=title, title_justify="left", caption=LEGEND, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    return table


def results_markdown(records: Sequence[RunRecord]) -> str:
    """Return the rows of `results_table` as a Markdown table."""
    rows = [HEADINGS, ["---", *["---:"] * (len(HEADINGS) - 1)], *_rows(records)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\n{LEGEND}\n"


def _rows(records: Sequence[RunRecord]) -> list[list[str]]:
    if not records:
        raise InputError("expected at least one run record for a table, got none")
    return [
        [
            record.method,
            _number(record.nll, ".4f"),
            _number(_gap(record, records), "+.4f"),
            _number(record.perplexity, ".2f"),
            _number(record.bits_per_byte, ".4f"),
            _number(record.bits_per_weight, ".3f"),
            _number(record.bytes / 1e6, ".2f"),
        ]
        for record in records
    ]


def _gap(record: RunRecord, records: Sequence[RunRecord]) -> float | None:
    """Nats per token above the dense twin: the first dense record of the same tokens."""
    twin = next((each for each in records if each.method == DENSE and _same_tokens(each, record)), None)
    if twin is None or twin is record or record.nll is None or twin.nll is None:
        return None
    return record.nll - twin.nll


def _same_tokens(one: RunRecord, other: RunRecord) -> bool:
    return all(one.data.get(key) == other.data.get(key) for key in SAME_TOKENS)


def _number(value: float | None, format_spec: str) -> str:
    return UNKNOWN if value is None else format(value, format_spec)
