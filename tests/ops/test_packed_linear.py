"""The packed operator gives the reference's bits, fits PyTorch's compilers, and says what does not fit."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet.errors import InputError
from bitnet.ops import cpu, packed_linear
from bitnet.ops.int8 import int8_linear
from bitnet.ops.packed_linear import reference_linear
from bitnet.quant import PackedTensor, absmean_ternary, centred_sign, pack

OPERATOR = torch.ops.bitnet.packed_linear.default
LAYOUTS = ["i2", "t5", "b1"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments(rows=3, columns=20, out=6, layout="i2", bias=True, dtype=torch.float32, activation="absmax", each=False):
    """Normal inputs with a row of zeros and one outlier; one scale for the weight, or ``each`` row its own."""
    weight = torch.randn(out, columns)
    codes = centred_sign(weight) if layout == "b1" else absmean_ternary(weight)
    packed = PackedTensor.of(codes, layout)
    x = torch.randn(rows, columns).to(dtype)
    if rows:
        x[0, 0] = 50
    if rows > 1:
        x[1] = 0
    scale = torch.rand(out, 1) if each else packed.scale
    return x, packed.packed, scale, torch.randn(out).to(dtype) if bias else None, layout, activation


@pytest.mark.usefixtures("unchecked")  # sizes are symbols there, and no ints
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_torch_finds_nothing_wrong_with_the_operator(layout, rows):
    torch.library.opcheck(OPERATOR, arguments(rows=rows, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["absmax", "absmax_b1"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_it_answers_the_references_bits(layout, activation, dtype):
    for rows in (1, 2, 3, 8, 17, 128):
        for columns, out in ((1, 1), (255, 66), (321, 7), (1000, 130)):
            args = arguments(rows, columns, out, layout, columns != 255, dtype, activation, each=rows == 3)
            assert torch.equal(packed_linear(*args), reference_linear(*args))


@given(
    st.integers(0, 20),
    st.integers(1, 700),
    st.integers(1, 100),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_it_answers_the_references_bits_for_any_shape(rows, columns, out, layout, bias, dtype, seed):
    torch.manual_seed(seed)
    args = arguments(rows, columns, out, layout, bias, dtype)
    assert torch.equal(packed_linear(*args), reference_linear(*args))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_int8_product_answers_the_references_bits_too(layout):
    for rows in (0, 1, 2, 17, 40):
        for columns, out in ((1, 1), (3, 5), (255, 66), (1000, 33)):
            args = arguments(rows, columns, out, layout, columns != 255, each=rows == 2)
            assert torch.equal(int8_linear(*args), reference_linear(*args))


@pytest.mark.parametrize("bias", [None, -torch.zeros(3)], ids=["no bias", "bias of -0.0"])
@pytest.mark.parametrize("columns", [1, 2, 17])
def test_zero_has_the_references_sign(columns, bias):
    weight = torch.tensor([[-1], [0], [1]], dtype=torch.int8).expand(3, columns).contiguous()
    packed, scale = pack(weight, "i2"), torch.ones(3, 1)
    x = torch.stack([torch.zeros(columns), torch.full((columns,), -0.7), torch.full((columns,), 0.7)])
    expected = reference_linear(x, packed, scale, bias, "i2")
    for linear in (packed_linear, lambda *arguments: int8_linear(*arguments, "absmax")):
        assert torch.equal(linear(x, packed, scale, bias, "i2").view(torch.int32), expected.view(torch.int32))


def test_sums_of_the_largest_codes_are_exact_up_to_the_longest_row():
    for columns in (65536, cpu.LONGEST_ROW):
        x, scale = torch.full((2, columns), 127.0), torch.ones(1, 1)
        packed = PackedTensor.of(absmean_ternary(torch.ones(3, columns))).packed
        assert torch.equal(packed_linear(x, packed, scale, None, "i2"), torch.full((2, 3), 127.0 * columns))


def test_a_longer_row_is_left_to_the_reference():
    args = arguments(2, cpu.LONGEST_ROW + 5, 3)
    assert torch.equal(packed_linear(*args), reference_linear(*args))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_with_a_number_that_is_none_gives_nan_and_no_other_row_does(number, dtype):
    args = arguments(5, 70, 9, dtype=dtype)
    args[0][2, 69] = number
    for answer in (packed_linear(*args), int8_linear(*args), reference_linear(*args)):
        assert answer[2].isnan().all()
        assert answer[[0, 1, 3, 4]].isfinite().all()


def test_inputs_in_any_order_of_memory_are_taken():
    args = arguments(6, 40, 5)
    expected = packed_linear(*args)
    wide = torch.zeros(6, 100)
    wide[:, 30:70] = args[0]
    assert torch.equal(packed_linear(wide[:, 30:70], *args[1:]), expected)
    assert torch.equal(packed_linear(args[0].t().contiguous().t(), *args[1:]), expected)
    assert torch.equal(packed_linear(args[0].reshape(2, 3, 40), *args[1:]), expected.reshape(2, 3, 5))
    assert torch.equal(
        packed_linear(args[0].reshape(2, 3, 40).transpose(0, 1), *args[1:]).transpose(0, 1).reshape(6, 5), expected
    )
    assert torch.equal(packed_linear(args[0][0], *args[1:]), expected[0])
    assert torch.equal(packed_linear(args[0], args[1].t().contiguous().t(), *args[2:]), expected)


def test_a_bias_in_another_dtype_is_added_as_the_reference_adds_it():
    for dtype in (*DTYPES, torch.float64):
        args = list(arguments(4, 60, 9, dtype=torch.bfloat16))
        args[3] = torch.randn(9, dtype=torch.float64).to(dtype)
        assert torch.equal(packed_linear(*args), reference_linear(*args))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_threads_changes_no_bit(layout):
    args = arguments(9, 640, 500, layout)
    expected, before = packed_linear(*args), torch.get_num_threads()
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(packed_linear(*args), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("function", [packed_linear, int8_linear])
@pytest.mark.parametrize("inference", [False, True])
def test_a_weight_changed_in_place_gives_the_new_answers(function, inference):
    with torch.inference_mode(inference):
        args, other = arguments(3, 50, 8), arguments(3, 50, 8)
        function(*args)
        args[1].copy_(other[1])
        assert torch.equal(function(*args), reference_linear(*args))


def test_bytes_that_become_damaged_are_refused_the_next_time():
    args = arguments()
    packed_linear(*args)
    args[1][2, 1] = 0b1100
    with pytest.raises(InputError, match=r"damaged.*row 2, byte 1 is 12"):
        packed_linear(*args)


@pytest.mark.parametrize(
    ("layout", "column", "byte"),
    [("i2", 0, 0b11), ("i2", 1, 0b11000000), ("i2", 5, 0b100), ("t5", 0, 243), ("t5", 4, 3), ("b1", 2, 0b100000)],
)
def test_every_byte_that_codes_cannot_pack_to_is_found(layout, column, byte):
    args = arguments(1, 21, 4, layout)
    args[1][3, column] = byte
    for function in (packed_linear, reference_linear, int8_linear):
        with pytest.raises(InputError, match="damaged"):
            function(*args)


def test_it_compiles_and_exports_without_a_break():
    args = arguments()
    compiled = torch.compile(packed_linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*args), packed_linear(*args))

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return packed_linear(x, *args[1:])

    exported = torch.export.export(Layer(), (args[0],), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}})
    x = torch.randn(11, 20)
    assert torch.equal(exported.module()(x), packed_linear(x, *args[1:]))


@pytest.mark.slow
def test_importing_the_operators_is_all_that_an_exported_program_needs(tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return packed_linear(x, *args)

    x, *args = arguments()
    torch.export.save(torch.export.export(Layer(), (x,)), tmp_path / "layer.pt2")
    torch.save((x, packed_linear(x, *args)), tmp_path / "expected.pt")
    load = (
        "import sys, torch, bitnet.ops; x, y = torch.load('expected.pt', weights_only=True); "
        "sys.exit(not torch.equal(torch.export.load('layer.pt2').module()(x), y))"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", load], cwd=tmp_path).returncode == 0


def test_inference_mode_and_grad_mode_give_the_same():
    args = arguments()
    expected = packed_linear(*args)
    with torch.inference_mode():
        assert torch.equal(packed_linear(*args), expected)
        assert torch.equal(packed_linear(args[0] + 0, args[1].clone(), *args[2:]), expected)
    assert torch.equal(packed_linear(args[0].requires_grad_(), *args[1:]), expected)


def test_autocast_changes_no_bit():
    args = arguments(columns=300)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed_linear(*args)
    assert torch.equal(found, packed_linear(*args))


def test_a_gradient_through_it_is_an_error():
    args = arguments()
    y = packed_linear(args[0].requires_grad_(), *args[1:])
    with pytest.raises(InputError, match="no gradient"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.randn(3, 21), "21 input features take 6 bytes"),
        (0, torch.zeros(3, 20, dtype=torch.int64), "x must be floating"),
        (0, torch.zeros(3, 0), "x must be floating"),
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


def test_nothing_is_remembered_of_a_weight_that_is_gone():
    before = len(cpu._sound)
    args = arguments()
    packed_linear(*args)
    assert len(cpu._sound) == before + 1
    del args
    assert len(cpu._sound) == before
