import dataclasses
from io import StringIO

import pytest
from rich.console import Console

from bitnet.errors import InputError
from bitnet.report import results_markdown, results_table
from bitnet.report.tables import OPTIONAL


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


JOINED = {"text": "joined", "text_hash": "ab", "window": 256, "stride": 256, "predicted_tokens": 99}


def test_figures_of_a_comparison_have_columns_where_a_record_has_them(three, make_record):
    quantized = make_record(
        method="gptq",
        gap=0.25,
        gap_interval=[0.24, 0.27],
        kl=0.26,
        top1_agreement=0.875,
        claimed_bits=4.0,
        quantized_share=0.69,
        quantize_seconds=12.34,
    )
    markdown = results_markdown([three[0], quantized])
    heading = cells(markdown, -2)
    assert ", ".join(heading) == (
        "method, loss, gap, gap ±, KL, top-1, perplexity, bits/byte, claimed, bits/weight, share, MB, quantize s"
    )
    row = dict(zip(heading, cells(markdown, 1), strict=True))
    assert [row[name] for name in OPTIONAL] == ["0.0150", "0.2600", "87.5%", "4.00", "69%", "12.3"]
    assert row["gap"] == "+0.2500"  # as measured, not the difference to the dense row
    assert dict(zip(heading, cells(markdown, 0), strict=True))["KL"] == "—"
    assert "half the 95 % interval" in markdown
    assert "KL" not in results_markdown(three)


def test_losses_of_different_protocols_are_not_subtracted(make_record):
    dense = make_record(method="full precision", nll=4.0, evaluation=JOINED)
    for evaluation in (None, {"text": "packed"}, JOINED | {"stride": 128}, JOINED | {"text_hash": "cd"}):
        other = make_record(method="gptq", nll=4.125, evaluation=evaluation)
        assert cells(results_markdown([dense, other]), 1)[2] == "—"
    same = make_record(method="gptq", nll=4.125, evaluation=JOINED)
    assert cells(results_markdown([dense, same]), 1)[2] == "+0.1250"


def test_blocks_of_training_are_no_part_of_a_joined_text_s_protocol(make_record):
    dense = make_record(method="dense", nll=4.0, evaluation=JOINED, data={"name": "c4", "block_size": 64})
    other = make_record(method="b1.58", nll=4.125, evaluation=JOINED, data={"name": "c4", "block_size": 32})
    assert cells(results_markdown([dense, other]), 1)[2] == "+0.1250"
    packed = [dataclasses.replace(record, evaluation={"text": "packed"}) for record in (dense, other)]
    assert cells(results_markdown(packed), 1)[2] == "—"


def test_a_record_that_names_no_protocol_was_evaluated_on_packed_blocks(three, make_record):
    named = make_record(method="b1.58 frozen", nll=4.125, evaluation={"text": "packed"})
    assert cells(results_markdown([three[0], named]), 1)[2] == "+0.1250"


def test_there_is_no_gap_to_the_twin_of_another_model(three, make_record):
    larger = make_record(method="b1.58 frozen", nll=3.5, model="large")
    assert cells(results_markdown([three[0], larger]), 1)[2] == "—"


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
