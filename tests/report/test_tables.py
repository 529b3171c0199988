from io import StringIO

import pytest
from rich.console import Console

from bitnet.errors import InputError
from bitnet.report import results_markdown, results_table


def rendered(table) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


@pytest.fixture
def three(make_record):
    return [
        make_record(method="dense", nll=4.0, perplexity=54.598, bits_per_weight=32.0, bytes=20_000_000),
        make_record(method="b1.58 latent", nll=4.125, perplexity=61.868, bits_per_weight=32.0, bytes=20_000_000),
        make_record(method="b1.58 frozen", nll=4.125, perplexity=61.868, bits_per_weight=1.6001, bytes=2_345_678),
    ]


def cells(markdown: str, row: int) -> list[str]:
    return [cell.strip() for cell in markdown.splitlines()[row + 2].strip("|").split("|")]


def test_markdown_holds_every_figure_and_the_gap_to_the_dense_row(three):
    markdown = results_markdown(three)
    assert cells(markdown, 0) == ["dense", "4.0000", "—", "54.60", "1.7500", "32.000", "20.00"]
    assert cells(markdown, 2) == ["b1.58 frozen", "4.1250", "+0.1250", "61.87", "1.7500", "1.600", "2.35"]


def test_every_markdown_row_has_as_many_cells_as_the_heading(three):
    rows = [line for line in results_markdown(three).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(three)
    assert len({row.count("|") for row in rows}) == 1


def test_a_model_better_than_its_twin_has_a_negative_gap(three, make_record):
    better = make_record(method="b1.58 latent", nll=3.9)
    assert cells(results_markdown([three[0], better]), 1)[2] == "-0.1000"


def test_there_is_no_gap_without_a_dense_row_or_to_one_of_other_data(three, make_record):
    other = make_record(method="dense", nll=1.0, data={"name": "c4", "hash": "ffff"})
    assert cells(results_markdown(three[1:]), 0)[2] == "—"
    assert cells(results_markdown([other, *three[1:]]), 1)[2] == "—"


def test_a_figure_that_was_not_measured_is_a_dash(make_record):
    record = make_record(nll=None, perplexity=None, bits_per_byte=None)
    assert cells(results_markdown([record]), 0)[1:5] == ["—", "—", "—", "—"]


def test_the_terminal_shows_the_same_rows(three):
    text = rendered(results_table(three, title="nano on pydocs"))
    assert "nano on pydocs" in text
    for row in range(3):
        assert all(cell in text for cell in cells(results_markdown(three), row))


def test_a_table_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least one"):
        results_table([])
