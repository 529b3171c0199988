"""The product of codes is exact, whatever the order of its additions; where it cannot be, it is close."""

import pytest
import torch

from bitnet.ops import quantized_linear
from bitnet.ops.reference import EXACT_SUM, integer_product_is_exact
from bitnet.quant import QTensor, absmax, absmean_ternary, zero_point


def ternary(rows: int, columns: int) -> QTensor:
    return absmean_ternary(torch.randn(rows, columns))


def integer_reference(x: QTensor, weight: QTensor) -> torch.Tensor:
    """The same sum in int64 and float64, one rounding at the end."""
    product = (x.qdata.long() @ weight.qdata.long().T).double()
    return product * weight.scale.double().reshape(-1) * x.scale.double()


@pytest.mark.parametrize("columns", [1, 3, 64, 257, 4096])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_codes_multiply_to_the_integer_result(columns, granularity):
    x, weight = absmax(torch.randn(5, columns)), absmean_ternary(torch.randn(7, columns), granularity=granularity)
    torch.testing.assert_close(
        quantized_linear(x, weight, None, torch.float64), integer_reference(x, weight), rtol=2e-7, atol=0
    )


def test_the_largest_sum_that_float32_holds_is_exact():
    columns = EXACT_SUM // 128
    x = QTensor(torch.full((1, columns), 127, dtype=torch.int8), torch.ones(1, 1), 255)
    weight = QTensor(torch.ones(1, columns, dtype=torch.int8), torch.ones(1, 1), 3)
    assert integer_product_is_exact(x, weight)
    assert quantized_linear(x, weight, None, torch.float64).item() == 127 * columns


def test_reversing_the_order_of_the_columns_changes_no_bit():
    x, weight = absmax(torch.randn(9, 1000)), ternary(11, 1000)
    back = torch.arange(999, -1, -1)
    reversed_x = QTensor(x.qdata[:, back], x.scale, x.levels)
    reversed_weight = QTensor(weight.qdata[:, back], weight.scale, weight.levels)
    forward = quantized_linear(x, weight, None, torch.float32)
    assert torch.equal(forward, quantized_linear(reversed_x, reversed_weight, None, torch.float32))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (absmax(torch.ones(1, 8)), absmean_ternary(torch.randn(2, 8), granularity=4)),  # a scale inside the sum
        (zero_point(torch.randn(1, 8)), ternary(2, 8)),  # a shift
        (absmax(torch.ones(1, 8)), zero_point(torch.randn(2, 8), bits=4)),
        (absmax(torch.ones(1, 2000)), absmax(torch.randn(2, 2000))),  # 127 * 127 * 2000 exceeds 2^24
        (absmax(torch.ones(1, EXACT_SUM // 128 + 1)), ternary(1, EXACT_SUM // 128 + 1)),
    ],
)
def test_what_float32_cannot_hold_exactly_is_computed_on_dequantized_values(x, weight):
    assert not integer_product_is_exact(x, weight)
    expected = x.dequantize().double() @ weight.dequantize().double().T
    torch.testing.assert_close(
        quantized_linear(x, weight, None, torch.float64), expected, rtol=1e-4, atol=1e-5, check_dtype=False
    )


def test_the_bias_is_added_after_the_rescaling_and_the_result_rounded_once():
    x, weight, bias = absmax(torch.randn(3, 16)), ternary(4, 16), torch.randn(4)
    without = quantized_linear(x, weight, None, torch.float32)
    assert torch.equal(quantized_linear(x, weight, bias, torch.bfloat16), (without + bias).bfloat16())


def test_autocast_does_not_round_the_product_of_codes():
    x, weight = absmax(torch.randn(3, 512)), ternary(4, 512)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantized_linear(x, weight, None, torch.float32)
    assert torch.equal(inside, quantized_linear(x, weight, None, torch.float32))


@pytest.mark.parametrize("whole_tensor", [True, False])
@pytest.mark.parametrize("group_size", [0, 5])
def test_the_mean_operator_keeps_its_contract_with_the_compiler(whole_tensor, group_size):
    x = torch.randn(6, 13)
    torch.library.opcheck(torch.ops.bitnet.mean_of_groups, (x, whole_tensor, group_size, True))
