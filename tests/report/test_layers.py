import csv
from dataclasses import dataclass

import pytest

from bitnet.errors import InputError
from bitnet.report.layers import layers_markdown, layers_picture, place_of, write_layers_csv


@dataclass(frozen=True)
class Row:
    name: str
    relative_error: float | None = 0.0123456
    weight_error: float = 0.02
    shape: tuple[int, int] = (48, 32)
    bits_per_weight: float = 4.25
    seconds: float = 0.125


KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


def rows(blocks: int = 6, **changes) -> list[Row]:
    return [
        Row(f"model.layers.{block}.{kind}", **({"relative_error": 0.001 * (block + 1) ** 3} | changes))
        for block in range(blocks)
        for kind in KINDS
    ]


def test_every_layer_has_a_line_with_its_figures():
    lines = layers_markdown([Row("model.layers.0.mlp.up_proj"), Row("lm_head", relative_error=None)]).splitlines()
    assert lines[2] == "| `model.layers.0.mlp.up_proj` | 48x32 | 4.250 | 0.0123 | 0.02 | 0.12 |"
    assert lines[3].split("|")[4].strip() == "—"


def test_the_file_holds_all_digits(tmp_path):
    path = write_layers_csv([Row("a", relative_error=1 / 3), Row("b", relative_error=None)], tmp_path / "layers.csv")
    with path.open() as file:
        first, second = csv.DictReader(file)
    assert float(first["relative_error"]) == 1 / 3
    assert (first["out_features"], first["in_features"], second["relative_error"]) == ("48", "32", "")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.self_attn.q_proj", (11, "self_attn.q_proj")),
        ("transformer.h.0.attn.c_attn", (0, "attn.c_attn")),
        ("model.layers.2.mlp.experts.7.down_proj", (2, "mlp.experts.7.down_proj")),
        ("0.fc", (0, "fc")),
        ("lm_head", (-1, "lm_head")),
    ],
)
def test_a_name_says_block_and_kind(name, place):
    assert place_of(name) == place


def test_the_picture_names_every_kind_and_error(tmp_path):
    text = layers_picture(rows(), tmp_path / "layers.svg").read_text()
    for word in (*KINDS, "0.001", "0.22", "output error"):
        assert f"<!-- {word} -->" in text
    again = layers_picture(rows(), tmp_path / "again.svg").read_text()
    assert again == text


@pytest.mark.parametrize(
    "given",
    [
        [Row("lm_head")],
        [*rows(2), Row("lm_head")],
        rows(2, relative_error=0.0),
        rows(2, relative_error=None, weight_error=1e-9),
        rows(80),
    ],
)
def test_any_layers_can_be_drawn(tmp_path, given):
    assert layers_picture(given, tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_without_calibration_the_weight_error_is_drawn(tmp_path):
    given = [*rows(2)[:-1], Row("model.layers.1.mlp.down_proj", relative_error=None)]
    assert "<!-- weight error -->" in layers_picture(given, tmp_path / "layers.svg").read_text()


def test_no_layer_a_layer_twice_and_an_unknown_format_are_refused(tmp_path):
    for report in (layers_markdown, lambda given: write_layers_csv(given, tmp_path / "layers.csv")):
        with pytest.raises(InputError, match="at least one quantized layer"):
            report([])
    with pytest.raises(InputError, match="each layer once"):
        layers_picture([Row("a"), Row("a")], tmp_path / "layers.png")
    with pytest.raises(InputError, match=r"got layers\.gif"):
        layers_picture(rows(), tmp_path / "layers.gif")
    assert not list(tmp_path.iterdir())
