"""The operator is registered as torch asks, and refuses what no kernel can compute."""

import pytest
import torch

from bitnet.errors import InputError
from bitnet.ops import packed_linear
from bitnet.quant import PackedTensor, absmean_ternary


def arguments(rows: int = 3, columns: int = 20, out: int = 6, layout: str = "i2", bias: bool = True):
    weight = PackedTensor.of(absmean_ternary(torch.randn(out, columns)), layout)
    return torch.randn(rows, columns), weight.packed, weight.scale, torch.randn(out) if bias else None, layout, "absmax"


@pytest.mark.usefixtures("unchecked")  # sizes are symbols there, and no ints
@pytest.mark.parametrize("layout", ["i2", "t5"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_torch_finds_nothing_wrong_with_the_operator(layout, rows):
    torch.library.opcheck(torch.ops.bitnet.packed_linear.default, arguments(rows=rows, layout=layout))


def test_it_compiles_without_a_break():
    args = arguments()
    compiled = torch.compile(packed_linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*args), packed_linear(*args))


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.randn(3, 21), "21 input features take 6 bytes"),
        (0, torch.zeros(3, 20, dtype=torch.int64), "x must be floating"),
        (1, torch.zeros(6, 5), "packed must be uint8"),
        (2, torch.ones(1), r"scale must be float32 \[1, 1\] or \[6, 1\]"),
        (2, torch.ones(1, 1, dtype=torch.float16), "scale must be float32"),
        (3, torch.ones(5), "bias must be floating"),
        (4, "i3", "layout must be one of"),
        (5, "absmin", "activation must be one of"),
        (1, torch.zeros(6, 5, dtype=torch.uint8, device="meta"), "packed is on meta and x on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(position, wrong, message):
    args = list(arguments())
    args[position] = wrong
    with pytest.raises(InputError, match=message):
        packed_linear(*args)


def test_bytes_that_are_no_codes_are_refused():
    args = list(arguments())
    args[1] = torch.full_like(args[1], 0b11)
    with pytest.raises(InputError, match="damaged"):
        packed_linear(*args)
