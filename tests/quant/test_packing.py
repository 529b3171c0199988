"""Packing is lossless for every shape, exact to the byte, and refuses what it did not write."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet.errors import InputError
from bitnet.quant import pack, packed_bits, unpack

TERNARY, SIGNS = (-1, 0, 1), (-1, 1)
LAYOUTS = [("i2", TERNARY, 4), ("t5", TERNARY, 5), ("b1", SIGNS, 8)]
INTEGERS = [(f"u{bits}", tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))) for bits in range(2, 9)]


def codes(values: tuple[int, ...], *shape: int, seed: int = 0) -> torch.Tensor:
    picks = torch.randint(0, len(values), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values, dtype=torch.int8)[picks]


@pytest.mark.parametrize(("layout", "values", "per_byte"), LAYOUTS)
@given(rows=st.integers(0, 5), columns=st.integers(1, 41), seed=st.integers(0, 999))
def test_unpacking_gives_the_packed_codes_back(layout, values, per_byte, rows, columns, seed):
    original = codes(values, rows, columns, seed=seed)
    packed = pack(original, layout)
    assert packed.shape == (rows, -(-columns // per_byte))
    assert torch.equal(unpack(packed, layout, columns), original)


@pytest.mark.parametrize(("layout", "values"), INTEGERS)
@given(rows=st.integers(1, 5), columns=st.integers(1, 41), seed=st.integers(0, 999))
def test_unpacking_gives_integers_of_every_width_back(layout, values, rows, columns, seed):
    original = codes(values, rows, columns, seed=seed)
    packed = pack(original, layout)
    assert packed.numel() * 8 == packed_bits((rows, columns), len(values))
    assert torch.equal(unpack(packed, layout, columns), original)


@pytest.mark.parametrize(("layout", "values"), [("t5", TERNARY), ("u3", tuple(range(-4, 4)))])
def test_a_large_matrix_is_converted_in_pieces_to_the_same_bytes(layout, values, monkeypatch):
    original = codes(values, 3, 7, 29)
    whole = pack(original, layout)
    monkeypatch.setattr("bitnet.quant.packing.PIECE", 100)
    assert torch.equal(pack(original, layout), whole)
    assert torch.equal(unpack(whole, layout, 29), original)


@pytest.mark.parametrize(
    ("layout", "row", "expected"),
    [
        ("i2", [-1, 0, 1, -1, 1], [0b00_10_01_00, 0b10]),
        ("t5", [-1, 0, 1, 0, 1, 1], [0 + 3 + 18 + 27 + 162, 2]),
        ("b1", [1, -1, 1, 1, -1, -1, -1, 1, 1], [0b10001101, 1]),
        ("u4", [-8, 7, 0], [0xF0, 8]),
        ("u3", [-4, -3, -2, 3], [0b10001000, 0b1110]),
    ],
)
def test_bytes_are_as_drawn(layout, row, expected):
    assert pack(torch.tensor([row], dtype=torch.int8), layout).tolist() == [expected]


@pytest.mark.parametrize(("layout", "values", "per_byte"), LAYOUTS)
def test_packed_bits_is_what_packing_takes(layout, values, per_byte):
    if layout != "i2":  # ternary codes are counted in their densest layout
        assert packed_bits((7, 13), len(values)) == pack(codes(values, 7, 13), layout).numel() * 8


def test_a_code_that_the_layout_cannot_hold_is_refused():
    with pytest.raises(InputError, match="layout b1 holds the codes"):
        pack(codes(TERNARY, 3, 8), "b1")
    with pytest.raises(InputError, match="u3 holds codes from -4 to 3"):
        pack(torch.tensor([[-1, 4]], dtype=torch.int8), "u3")
    with pytest.raises(InputError, match="got codes from -1 to 2"):
        pack(torch.tensor([[-1, 2]], dtype=torch.int8), "i2")


@pytest.mark.parametrize(
    ("layout", "byte", "columns"),
    [
        ("u4", 0xF0, 1),
        ("u3", 8, 1),
        ("i2", 0b11, 4),
        ("i2", 0b10_00_00, 2),
        ("t5", 243, 5),
        ("t5", 255, 5),
        ("t5", 3, 1),
        ("b1", 0b100, 2),
    ],
)
def test_a_byte_that_no_codes_pack_to_is_refused(layout, byte, columns):
    with pytest.raises(InputError, match="damaged"):
        unpack(torch.tensor([[byte]], dtype=torch.uint8), layout, columns)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(InputError, match="9 columns take 3 bytes a row in layout i2, got 2"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), "i2", 9)


def test_an_unknown_layout_is_refused():
    with pytest.raises(InputError, match=r"layout must be one of i2, .* u8, got 'i4'"):
        pack(codes(TERNARY, 1, 4), "i4")
