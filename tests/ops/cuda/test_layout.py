"""Prepacking is a permutation of the codes, and the one that is drawn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet.ops.cuda.layout import prepack, unprepack


@given(rows=st.integers(1, 140), columns=st.integers(1, 270), seed=st.integers(0, 9))
def test_prepacking_loses_nothing(rows, columns, seed):
    codes = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    weight = prepack(codes)
    assert weight.tiles.shape == (-(-rows // 128) * 8, -(-columns // 128), 512)
    assert torch.equal(unprepack(weight), codes)


@pytest.mark.parametrize("seed", range(3))
def test_every_weight_is_where_the_drawing_says(seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (40, 300), generator=generator, dtype=torch.int8)
    tiles = prepack(codes).tiles
    for row, column in zip(
        torch.randint(40, (200,), generator=generator).tolist(),
        torch.randint(300, (200,), generator=generator).tolist(),
        strict=True,
    ):
        g, upper, t, h = row % 8, row // 8 % 2, column // 32 % 4, column // 8 % 4
        byte = int(tiles[row // 16, column // 128, 16 * (4 * g + t) + 4 * h + column % 4])
        assert (byte >> (2 * upper + 4 * (column // 4 % 2)) & 3) - 1 == int(codes[row, column])


def test_codes_are_not_changed():
    codes = torch.randint(-1, 2, (5, 7), dtype=torch.int8)
    kept = codes.clone()
    prepack(codes)
    assert torch.equal(codes, kept)
