import math
import random

import pytest
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text

from bitnet.errors import InputError
from bitnet.report.pareto import Point, front, pareto


@pytest.fixture
def quantized(make_record):
    """A record of a quantized model; full precision has perplexity 40."""

    def make(method: str, bits: float, gap: float | None, **changes):
        nll = math.log(40) + (gap or 0.0)
        figures = {"nll": nll, "perplexity": math.exp(nll), "gap": gap, "bits_per_weight": bits}
        return make_record(method=method, **(figures | changes))

    return make


@pytest.fixture
def labels(monkeypatch):
    """The annotations of the last picture that was drawn."""
    found: list[Annotation] = []
    original = Axes.annotate

    def annotate(self: Axes, *args, **kwargs) -> Annotation:
        found.append(original(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(Axes, "annotate", annotate)
    return lambda: [note for note in found if note.figure is not None]  # those that were not removed again


def test_a_picture_is_written_in_the_format_of_its_name(quantized, tmp_path):
    records = [quantized("full precision", 16.0, None), quantized("gptq", 4.25, 0.01)]
    for suffix, head in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        assert pareto(records, tmp_path / f"pareto{suffix}").read_bytes().startswith(head)


def test_thirty_labels_cover_neither_each_other_nor_a_point(quantized, tmp_path, labels):
    rng = random.Random(1)
    records = [
        quantized(
            f"method {n}", rng.choice([1.6, 2.14, 2.5, 3.15, 4.25]) + rng.uniform(0, 0.1), 10 ** rng.uniform(-3, -1)
        )
        for n in range(30)
    ]
    pareto(records, tmp_path / "pareto.png")
    notes = [note for note in labels() if note.get_text().startswith("method")]
    assert sorted(note.get_text() for note in notes) == sorted(record.method for record in records)
    boxes = [Text.get_window_extent(note) for note in notes]
    assert not any(one.overlaps(two) for place, one in enumerate(boxes) for two in boxes[:place])
    for note, box in zip(notes, boxes, strict=True):
        assert not box.contains(*note.axes.transData.transform(note.xy))


def test_the_front_holds_what_nothing_else_beats():
    points = [
        Point(label, "", bits, height)
        for label, bits, height in [
            ("worse", 4.5, 0.02),
            ("best at 4", 4.0, 0.01),
            ("same bits", 4.0, 0.03),
            ("as good at more", 5.0, 0.01),
            ("2", 2.0, 0.1),
            ("6", 6.0, -0.001),
        ]
    ]
    assert [point.label for point in front(points)] == ["2", "best at 4", "6"]


def test_full_precision_is_a_line_and_no_point(quantized, tmp_path, labels):
    records = [quantized("full precision", 16.0, None), quantized("gptq", 4.25, 0.01)]
    pareto(records, tmp_path / "pareto.png")
    assert [note.get_text() for note in labels()] == ["full precision, perplexity 40.00", "gptq"]
    pareto(records[1:], tmp_path / "pareto.png")  # its perplexity follows from the gap
    assert labels()[-2].get_text() == "full precision, perplexity 40.00"


def test_a_control_that_was_trained_on_is_not_what_gaps_are_to(quantized, tmp_path, labels):
    records = [quantized("dense", 32.0, -0.1), quantized("gptq", 4.25, 0.01)]
    pareto(records, tmp_path / "pareto.png")
    assert [note.get_text() for note in labels()] == ["full precision, perplexity 40.00", "gptq"]


@pytest.mark.parametrize("gaps", [(0.0, 0.0), (-0.01, 0.2), (-0.5, -0.4), (None, None), (1e-7, 3.0)])
def test_any_gaps_can_be_drawn(quantized, tmp_path, gaps):
    records = [quantized(f"method {bits}", float(bits), gap) for bits, gap in zip((2, 4), gaps, strict=True)]
    assert pareto(records, tmp_path / "pareto.png").exists()


def test_latent_models_are_left_out(quantized, tmp_path, labels):
    pareto([quantized("b1.58 latent", 32.0, 0.3), quantized("b1.58 frozen", 1.6, 0.3)], tmp_path / "pareto.png")
    assert "b1.58 latent" not in [note.get_text() for note in labels()]


def test_the_same_records_give_the_same_bytes(quantized, tmp_path):
    pictures = [pareto([quantized("a", 2.0, 0.1)], tmp_path / f"{name}.svg").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]


def test_losses_of_different_texts_are_not_put_on_one_axis(quantized, tmp_path):
    other = quantized("rtn", 4.0, 0.1, evaluation={"text": "joined", "window": 64})
    with pytest.raises(InputError, match="rtn and gptq were evaluated on different tokens or windows"):
        pareto([quantized("gptq", 4.0, 0.1), other], tmp_path / "pareto.png")
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw_and_an_unknown_format_are_refused(quantized, tmp_path):
    with pytest.raises(InputError, match="at least one quantized model"):
        pareto([quantized("dense", 32.0, None)], tmp_path / "pareto.png")
    with pytest.raises(InputError, match=r"got pareto\.gif"):
        pareto([quantized("gptq", 4.0, 0.1)], tmp_path / "pareto.gif")
