"""The CUDA kernels, executed on the CPU by the emulator, answer like the reference, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitnet.ops.activations import ACTIVATIONS
from bitnet.ops.cuda.layout import prepack
from bitnet.ops.cuda.plan import MULTIPLICATIONS, launches, multiplication
from bitnet.ops.packed_linear import reference_linear
from bitnet.quant import PackedTensor, QTensor, absmean_ternary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ternary(rows: int, columns: int, per_row: bool = False) -> QTensor:
    weight = absmean_ternary(torch.randn(rows, columns) * 0.02)
    scale = torch.rand(rows, 1) + 0.01 if per_row else weight.scale
    return QTensor(weight.qdata, scale, levels=3)


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(tokens, columns) * torch.logspace(-3, 2, tokens)[:, None]
    x[tokens // 2, columns // 3] = 80.0  # an outlier takes all of its row's range
    return x.to(dtype)


def answer(
    emulator, x, weight: QTensor, bias=None, activation="absmax", backwards=False, multiprocessors=1, kernel=None
) -> Tensor:
    y = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype)
    plan = launches(x, prepack(weight.qdata), weight.scale, bias, y, activation, multiprocessors, kernel)
    emulator.run(plan, backwards)
    return y


def expected(x: Tensor, weight: QTensor, bias: Tensor | None = None, activation: str = "absmax") -> Tensor:
    packed = PackedTensor.of(weight)
    return reference_linear(x, packed.packed, packed.scale, bias, packed.layout, activation)


def equal(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(), right.nan_to_num())


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("tokens", [*range(1, 18), 31, 64, 65])
def test_every_number_of_tokens_is_exact(emulator, tokens, backwards):
    x, weight = inputs(tokens, 300, torch.float32), ternary(50, 300)
    assert equal(answer(emulator, x, weight, backwards=backwards), expected(x, weight))


@pytest.mark.parametrize("multiprocessors", [1, 10**6], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 20])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 700), (17, 1), (16, 128), (15, 127), (33, 129), (130, 512)])
def test_every_shape_is_exact(emulator, rows, columns, tokens, multiprocessors):
    x, weight = inputs(tokens, columns, torch.bfloat16), ternary(rows, columns, per_row=True)
    bias = torch.randn(rows, dtype=torch.bfloat16)
    found = answer(emulator, x, weight, bias, multiprocessors=multiprocessors)
    assert equal(found, expected(x, weight, bias))


@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [None, *DTYPES])
def test_every_dtype_of_inputs_and_bias_is_exact(emulator, dtype, bias, activation, tokens):
    x, weight = inputs(tokens, 200, dtype), ternary(40, 200, per_row=True)
    offset = None if bias is None else torch.randn(40, dtype=bias)
    assert equal(answer(emulator, x, weight, offset, activation), expected(x, weight, offset, activation))


@pytest.mark.parametrize("tokens", [3, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_zeros_and_tiny_rows_are_exact(emulator, dtype, tokens):
    weight = ternary(20, 256)
    x = torch.randint(-254, 255, (tokens, 256)).to(dtype) / 2  # halves of a step, where the maximum is 127
    x[:, 0] = 127
    x[1] = 0
    x[2] = torch.randn(256).to(dtype) * 1e-7  # below the smallest maximum
    assert equal(answer(emulator, x, weight), expected(x, weight))


@pytest.mark.parametrize("tokens", [4, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_what_is_not_finite_are_nan_and_others_are_not(emulator, dtype, tokens):
    x, weight = inputs(tokens, 130, dtype), ternary(18, 130)
    x[0, 5], x[1, 129], x[2, 0] = torch.nan, torch.inf, -torch.inf
    found = answer(emulator, x, weight)
    assert found[:3].isnan().all()
    assert equal(found, expected(x, weight))


@pytest.mark.parametrize("tokens", [1, 4, 18])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(emulator, tokens, sign):
    columns = 20000 if tokens < 18 else 5000
    x, ones = torch.full((tokens, columns), 3.0 * sign), torch.ones(17, columns, dtype=torch.int8)
    weight = QTensor(ones, torch.full((1, 1), 0.037), levels=3)
    assert equal(answer(emulator, x, weight), expected(x, weight))


@pytest.mark.parametrize("kernel", list(MULTIPLICATIONS))
def test_65536_columns_of_the_largest_codes_are_exact_for_one_output_in_every_kernel(emulator, kernel):
    x, ones = torch.full((1, 65536), -127.0), torch.ones(1, 65536, dtype=torch.int8)
    weight = QTensor(ones, torch.full((1, 1), 1.0), levels=3)
    assert answer(emulator, x, weight, kernel=kernel).item() == -127 * 65536


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_weight_of_zeros_and_inputs_of_zeros_give_zeros_and_the_bias(emulator, tokens):
    x, bias = torch.randn(tokens, 200), torch.randn(40)
    zeros = QTensor(torch.zeros(40, 200, dtype=torch.int8), torch.full((1, 1), 0.1), levels=3)
    assert torch.equal(answer(emulator, x, zeros, bias), bias.expand(tokens, -1))
    assert torch.equal(answer(emulator, x * 0, ternary(40, 200), bias), bias.expand(tokens, -1))


def test_values_that_float16_cannot_hold_become_infinite_as_in_torch(emulator):
    x = (torch.randn(5, 100) * 6e4).to(torch.float16).nan_to_num(posinf=6e4, neginf=-6e4)
    weight = ternary(40, 100, per_row=True)
    found = answer(emulator, x, weight)
    assert found.isinf().any()
    assert torch.equal(found, expected(x, weight))


def test_float16_results_below_the_smallest_normal_number_are_exact(emulator):
    x, weight = torch.randn(4, 100).half(), ternary(33, 100)
    weight = QTensor(weight.qdata, torch.full((1, 1), 3e-6), levels=3)
    assert torch.equal(answer(emulator, x, weight), expected(x, weight))


def test_signs_are_ternary_codes_too(emulator):
    x, codes = inputs(3, 90, torch.float32), torch.randint(0, 2, (21, 90), dtype=torch.int8) * 2 - 1
    weight = QTensor(codes, torch.full((1, 1), 0.1), levels=2)
    assert torch.equal(answer(emulator, x, weight, activation="absmax_b1"), expected(x, weight, activation="absmax_b1"))


@pytest.mark.parametrize("tokens", [1, 5, 66])
@pytest.mark.parametrize("kernel", list(MULTIPLICATIONS))
def test_every_kernel_is_exact_for_every_number_of_tokens(emulator, kernel, tokens):
    x, weight = inputs(tokens, 140, torch.float16), ternary(150, 140)
    assert equal(answer(emulator, x, weight, kernel=kernel), expected(x, weight))


@pytest.mark.parametrize("warps", [4, 8, 16])
@pytest.mark.parametrize("kernel", [name for name in MULTIPLICATIONS if "tiles" not in name])
def test_every_number_of_warps_is_exact(emulator, kernel, warps):
    warps = min(warps, MULTIPLICATIONS[kernel].most_warps)
    x, weight = inputs(3, 128 * 16 * 2 + 5, torch.bfloat16), ternary(20, 128 * 16 * 2 + 5)
    y = torch.empty(3, 20, dtype=torch.bfloat16)
    quantize, multiply = launches(x, prepack(weight.qdata), weight.scale, None, y, "absmax", 1, kernel)
    emulator.run([quantize, replace(multiply, threads=32 * warps)])
    assert equal(y, expected(x, weight))


@pytest.mark.parametrize(
    ("outputs", "columns", "warps"),
    [(13824, 2560, 4), (6912, 2560, 8), (2560, 2560, 8), (2560, 6912, 16), (2560, 128, 4)],
)
def test_blocks_have_more_warps_where_there_are_few(outputs, columns, warps):
    form = MULTIPLICATIONS["multiply_1"]
    blocks, _ = form.grid(1, outputs)
    assert form.threads(blocks, columns // 128, multiprocessors=132) == 32 * warps


@pytest.mark.parametrize(
    ("tokens", "outputs", "kernel", "grid"),
    [
        (1, 2560, "multiply_1", (160, 1)),
        (2, 2561, "multiply_2", (161, 1)),
        (3, 1, "multiply_8", (1, 1)),
        (5, 2560, "multiply_8", (160, 1)),
        (16, 16, "multiply_16", (1, 1)),
        (64, 2560, "multiply_32", (160, 2)),
        (65, 2560, "multiply_tiles_64x32", (3, 40)),
        (1024, 13824, "multiply_tiles_128x64", (16, 108)),
    ],
)
def test_the_kernel_follows_from_the_shape(tokens, outputs, kernel, grid):
    assert multiplication(tokens, outputs, multiprocessors=132) == kernel
    assert MULTIPLICATIONS[kernel].grid(tokens, outputs) == grid
