import math

import pytest

from bitnet.errors import InputError
from bitnet.report import read_metrics, training_curves


def falling(gap: float, steps: int = 100) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(0, steps, 5):
        loss = 4 + gap + 4 * math.exp(-step / 20)
        rows.append({"step": step, "train/loss": loss})
        if step % 20 == 0:
            rows.append({"step": step, "val/loss": loss + 0.1})
    return rows


def write_metrics(path, rows: list[tuple[object, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("epoch,step,train/loss,val/loss\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))


def test_a_picture_is_written_in_the_format_of_its_name(tmp_path):
    for suffix, head in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = training_curves({"dense": falling(0)}, tmp_path / f"curves{suffix}")
        assert path.read_bytes().startswith(head)


def test_every_run_is_named_with_its_last_validation_loss(tmp_path):
    runs = {"dense": falling(0), "b1.58": falling(0.25)}
    # Text in an SVG is drawn as glyphs; a comment before them says what they spell.
    text = training_curves(runs, tmp_path / "curves.svg").read_text()
    for name, rows in runs.items():
        last = [row["val/loss"] for row in rows if "val/loss" in row][-1]
        assert f"{name}  {last:.3f}" in text


def test_the_same_curves_give_the_same_bytes(tmp_path):
    pictures = [training_curves({"b1.58": falling(0)}, tmp_path / f"{name}.svg").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]


def test_a_lightning_metrics_file_is_drawn_with_its_empty_cells(tmp_path):
    write_metrics(tmp_path / "metrics.csv", [(0, 9, 5.5, ""), (0, 19, 5.0, ""), (0, 19, "", 5.25)])
    text = training_curves({"run": tmp_path / "metrics.csv"}, tmp_path / "curves.svg").read_text()
    assert "run  5.250" in text


def test_a_resumed_run_is_one_curve_in_which_the_later_start_counts(tmp_path):
    write_metrics(tmp_path / "csv/version_9/metrics.csv", [(0, 9, 5.5, ""), (0, 19, 5.0, ""), (0, 29, 4.9, "")])
    write_metrics(tmp_path / "csv/version_10/metrics.csv", [(0, 19, 5.1, ""), (0, 29, 4.8, "")])
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["train/loss"]) for row in rows] == [("9", "5.5"), ("19", "5.1"), ("29", "4.8")]


def test_a_run_without_a_loss_is_refused_with_the_columns_it_has(tmp_path):
    with pytest.raises(InputError, match=r"run odd has no value.*\['lr', 'step'\]"):
        training_curves({"odd": [{"step": 1, "lr": 2.0}]}, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_no_run_a_missing_file_and_an_unknown_format_are_refused(tmp_path):
    with pytest.raises(InputError, match="1 to 7 runs"):
        training_curves({}, tmp_path / "curves.png")
    with pytest.raises(InputError, match=r"metrics\.csv at or below"):
        training_curves({"run": tmp_path}, tmp_path / "curves.png")
    with pytest.raises(InputError, match=r"got curves\.gif"):
        training_curves({"run": falling(0)}, tmp_path / "curves.gif")


def test_a_constant_loss_can_be_drawn(tmp_path):
    rows = [{"step": step, "val/loss": 4.0} for step in range(5)]
    assert training_curves({"flat": rows}, tmp_path / "curves.png").exists()
