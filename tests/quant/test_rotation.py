"""Turned inputs: a Hadamard matrix that keeps products, with an exact gradient, and what rounds after it."""

import math

import pytest
import torch

from bitnet.errors import InputError
from bitnet.export.codec import restore_activation, store_activation
from bitnet.quant import Rotated, RotatedInputs, absmax, absmean_int4, in_eight_bits, rotate


def hadamard(size):
    """Sylvester's matrix, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def dense(columns, block):
    """The whole turning as one matrix."""
    return torch.block_diag(*[hadamard(block) / math.sqrt(block)] * (columns // block))


@pytest.mark.parametrize(
    ("columns", "block", "used"),
    [(2, None, 2), (8, None, 8), (256, None, 256), (48, None, 16), (48, 4, 4), (6, None, 2)],
)
def test_it_multiplies_each_block_of_columns_by_sylvesters_matrix(columns, block, used):
    x = torch.randn(3, 5, columns)
    x[0, 0, 0] = 50
    expected = x.double() @ dense(columns, used)
    torch.testing.assert_close(rotate(x, block).double(), expected, rtol=1e-6, atol=1e-6 * 50)


def test_it_is_its_own_inverse_and_keeps_products():
    x, weight = torch.randn(7, 96), torch.randn(5, 96)
    torch.testing.assert_close(rotate(rotate(x)), x)
    torch.testing.assert_close(rotate(x) @ rotate(weight).T, x @ weight.T, rtol=1e-4, atol=1e-5)


def test_a_row_is_turned_to_the_same_bits_alone_as_in_any_batch():
    x = torch.randn(9, 3, 160)
    whole = rotate(x)
    assert torch.equal(whole[4, 1], rotate(x[4, 1]))
    assert torch.equal(whole[:, 2], rotate(x[:, 2]))
    assert torch.equal(rotate(x.transpose(0, 1)), whole.transpose(0, 1))


def test_the_argument_stays_as_it_is_and_narrow_inputs_are_turned_in_float32():
    x = torch.randn(2, 32).bfloat16()
    before = x.clone()
    assert torch.equal(rotate(x), rotate(x.float()))
    assert rotate(x).dtype == torch.float32
    assert torch.equal(x, before)


def test_its_gradient_is_the_gradient_turned_back():
    x = torch.randn(2, 3, 24, requires_grad=True)
    gradient = torch.randn(2, 3, 24)
    rotate(x).backward(gradient)
    torch.testing.assert_close(x.grad, (gradient.double() @ dense(24, 8)).float())


@pytest.mark.usefixtures("unchecked")  # sizes are symbols there
def test_torch_finds_nothing_wrong_with_the_operator():
    torch.library.opcheck(torch.ops.bitnet.hadamard.default, (torch.randn(3, 24, requires_grad=True), 8))


def test_rows_without_numbers_and_numbers_that_are_none():
    assert rotate(torch.zeros(0, 8)).shape == (0, 8)
    x = torch.randn(2, 8)
    x[0, 3] = float("inf")
    q = Rotated()(x)
    assert not torch.isfinite(q.dequantize()[0]).any()
    assert torch.isfinite(q.dequantize()[1]).all()


@pytest.mark.parametrize(("bits", "plain"), [(4, absmean_int4), (8, absmax)])
def test_the_quantizer_rounds_the_turned_inputs(bits, plain):
    x = torch.randn(4, 64)
    turned, expected = Rotated(bits)(x), plain(rotate(x))
    assert torch.equal(turned.qdata, expected.qdata)
    assert torch.equal(turned.scale, expected.scale)
    assert turned.levels == expected.levels


def test_one_large_input_is_shared_out():
    x = torch.randn(16, 256)
    x[:, 7] = 40
    error = (absmean_int4(x).dequantize() - x).square().mean()
    turned = (Rotated()(x).dequantize() - rotate(x)).square().mean()
    assert turned < error / 5


@pytest.mark.parametrize("quantizer", [Rotated(), Rotated(8, "tensor", 4)])
def test_it_reads_back_from_what_a_file_holds(quantizer):
    stored = store_activation(quantizer)
    assert restore_activation(stored.entry, stored.tensors) == quantizer


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: rotate(torch.randn(2, 9)), "need an even width, got 9"),
        (lambda: rotate(torch.randn(2, 24), 16), "divides the inputs' width 24, got 16: leave it at null.*8"),
        (lambda: rotate(torch.randn(2, 24), 3), "a power of two"),
        (lambda: Rotated(9), "bits must be 2 to 8, got 9"),
        (lambda: Rotated(block=12), "a power of two"),
        (lambda: RotatedInputs("o_proj"), "a list of patterns of layers' names, got 'o_proj'"),
        (lambda: RotatedInputs([]), "for no layer take activation=a4"),
        (lambda: RotatedInputs(bits=1), "bits must be 2 to 8"),
        (lambda: in_eight_bits(absmax), "only where they end in fewer"),
        (lambda: in_eight_bits(Rotated(8)), "leave out warmup.narrow"),
        (lambda: in_eight_bits(None), "got none"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()
