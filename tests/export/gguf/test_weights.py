"""Codes and scales in GGUF's types: bit for bit what gguf-py reads, nothing rounded unasked, and back."""

import gguf
import numpy as np
import pytest
import torch

from bitnet.errors import InputError
from bitnet.export.gguf.types import TYPES, tensor_type
from bitnet.export.gguf.weights import decode, encode, i2_s_tail, type_for
from bitnet.quant import PackedTensor, QTensor, absmax
from bitnet.quant.ggml import GGMLWeight, absmax_blocks


def ternary(rows=5, columns=512, scale=0.0371, levels=3, seed=0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    codes[0] = 0
    codes[1] = 1
    if levels == 2:
        codes[codes == 0] = -1
    return QTensor(codes, torch.full((1, 1), scale), levels)


def integers(bits: int, group: int | None, *, zero: bool, rows=6, columns=256, scale=None) -> QTensor:
    generator = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if not zero and bits == 8:
        low = -127
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator, dtype=torch.int32).to(torch.int8)
    groups = 1 if group is None else columns // group
    scales = (torch.rand(rows, groups, generator=generator) * 0.1 + 0.01).half() if scale is None else scale
    points = torch.randint(low, high + 1, scales.shape, generator=generator).to(torch.int8) if zero else None
    return QTensor(codes, scales, 2**bits - (bits == 8 and not zero), points, group)


def by_gguf(data: torch.Tensor, name: str) -> np.ndarray:
    return gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])


def by_hand(data: torch.Tensor, name: str) -> np.ndarray:
    """The types that gguf 0.19 does not know, one weight at a time by ggml's definition."""
    out = []
    for row in data.numpy():
        values = []
        if name == "I2_S":
            for block in row.reshape(-1, 32):
                values += [int(block[j % 32] >> (6 - 2 * (j // 32)) & 3) - 1 for j in range(128)]
        for block in row.reshape(-1, 18) if name != "I2_S" else []:
            d = float(block[:2].copy().view(np.float16)[0])
            if name == "Q2_0":
                values += [(int(block[2 + j // 4] >> 2 * (j % 4) & 3) - 1) * d for j in range(64)]
            else:
                values += [d if block[2 + j // 8] >> j % 8 & 1 else -d for j in range(128)]
        out.append(values)
    return np.array(out, dtype=np.float32)


@pytest.mark.parametrize("name", ["TQ2_0", "TQ1_0", "Q2_0", "I2_S", "Q1_0"])
def test_ternary_codes_and_signs_keep_codes_and_scale_exactly(name):
    weight = ternary(levels=2 if name == "Q1_0" else 3)
    chosen = type_for(weight, name, "tensor")
    assert chosen.name == name
    encoded = encode(weight, chosen, "tensor")
    assert encoded.data.shape == (5, chosen.row(512))
    assert encoded.scale == float(weight.scale)
    plain = by_gguf(encoded.data, name) if name.startswith("T") else by_hand(encoded.data, name)
    np.testing.assert_array_equal(plain, weight.qdata.float().numpy())
    read = decode(encoded.data, chosen, 512, encoded.scale, "w")
    assert isinstance(read, QTensor)
    assert torch.equal(read.qdata, weight.qdata)
    assert torch.equal(read.scale, weight.scale)


@pytest.mark.parametrize("name", ["TQ2_0", "TQ1_0", "Q2_0"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (5, 2)])
def test_block_scales_are_the_scales_rounded_to_float16(name, shape):
    scale = torch.rand(shape) * 0.1 + 0.01
    weight = QTensor(ternary().qdata, scale, 3, None, 256 if shape[1] > 1 else None)
    chosen = type_for(weight, name, "block")
    encoded = encode(weight, chosen, "block")
    assert encoded.scale is None
    expected = QTensor(weight.qdata, scale.half().float(), 3, None, weight.group_size)
    assert torch.equal(decode(encoded.data, chosen, 512, None, "w").dequantize(), expected.dequantize())


@pytest.mark.parametrize(("bits", "zero"), [(2, True), (3, True), (4, False), (2, False), (3, False)])
@pytest.mark.parametrize("group", [None, 32, 128])
def test_small_codes_with_float16_scales_go_into_q4_0_without_loss(bits, zero, group):
    weight = integers(bits, group, zero=zero)
    chosen = type_for(weight, "auto", "tensor")
    assert chosen.name == "Q4_0"
    encoded = encode(weight, chosen, "tensor")
    np.testing.assert_array_equal(by_gguf(encoded.data, "Q4_0"), weight.dequantize().numpy())
    read = decode(encoded.data, chosen, 256, None, "w")
    assert isinstance(read, GGMLWeight)
    assert torch.equal(read.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("bits", "zero"), [(4, True), (5, False), (6, True), (7, True), (8, False)])
def test_larger_codes_go_into_q8_0_without_loss(bits, zero):
    weight = integers(bits, 64, zero=zero)
    chosen = type_for(weight, "auto", "tensor")
    assert chosen.name == "Q8_0"
    encoded = encode(weight, chosen, "tensor")
    np.testing.assert_array_equal(by_gguf(encoded.data, "Q8_0"), weight.dequantize().numpy())


def test_one_float32_scale_for_int8_goes_beside_the_codes():
    weight = absmax(torch.randn(4, 96), granularity="tensor")
    chosen = type_for(weight, "auto", "tensor")
    encoded = encode(weight, chosen, "tensor")
    read = decode(encoded.data, chosen, 96, encoded.scale, "w")
    assert isinstance(read, QTensor)
    assert torch.equal(read.qdata, weight.qdata)
    assert torch.equal(read.scale, weight.scale)


def test_the_type_is_chosen_by_what_rows_and_groups_are_multiples_of():
    assert type_for(ternary(columns=256), "auto", "tensor").name == "TQ2_0"
    assert type_for(ternary(columns=320), "auto", "tensor").name == "Q2_0"
    assert type_for(ternary(levels=2), "auto", "tensor").name == "Q1_0"
    grouped = QTensor(ternary().qdata, torch.full((5, 4), 0.5).half(), 3, None, 128)
    assert type_for(grouped, "auto", "tensor").name == "Q2_0"
    assert type_for(PackedTensor.of(ternary()), "TQ1_0", "tensor").name == "TQ1_0"


def test_k_quants_are_carried_as_they_are():
    weight = absmax_blocks(torch.randn(3, 64), "Q8_0")
    assert encode(weight, type_for(weight, "auto", "tensor"), "tensor").data is weight.data


@pytest.mark.parametrize(
    ("weight", "type", "scale", "match"),
    [
        (ternary(columns=192), "TQ2_0", "tensor", "multiple of 256 for TQ2_0, got 192: type=Q2_0 asks for 64"),
        (ternary(columns=100), "auto", "tensor", "multiple of 256 for TQ2_0, got 100: leave the layer dense"),
        (ternary(columns=320), "I2_S", "tensor", "multiple of 128 for I2_S"),
        (ternary(), "Q1_0", "tensor", "Q1_0 has no zero"),
        (QTensor(ternary().qdata, torch.rand(5, 1) + 0.1, 3), "TQ2_0", "tensor", "exact in float16"),
        (QTensor(ternary().qdata, torch.rand(5, 1) + 0.1, 3), "I2_S", "tensor", "one float32 scale a matrix"),
        (QTensor(ternary().qdata, torch.full((5, 8), 1.0), 3, None, 64), "TQ2_0", "tensor", "groups of 64 columns"),
        (ternary(scale=1e-9), "TQ2_0", "block", "too large or too small for the float16"),
        (ternary(scale=1e9), "TQ2_0", "block", "too large or too small for the float16"),
        (integers(4, 32, zero=False), "TQ2_0", "tensor", "there are 16 levels here: set type=auto"),
        (integers(8, 32, zero=True), "auto", "tensor", "fit no GGUF type"),
        (integers(4, 32, zero=False, columns=96, scale=torch.rand(6, 3) + 0.1), "auto", "tensor", "exact in float16"),
        (absmax_blocks(torch.randn(2, 64), "Q8_0"), "TQ2_0", "tensor", "Q8_0 already, and not quantized again"),
        (absmax_blocks(torch.randn(2, 65), "Q8_0"), "auto", "tensor", "multiple of 32 for Q8_0, got 65"),
    ],
)
def test_what_fits_no_type_is_refused_with_what_would_make_it_fit(weight, type, scale, match):
    with pytest.raises(InputError, match=match):
        type_for(weight, type, scale)


@pytest.mark.parametrize("name", ["TQ2_0", "Q2_0", "I2_S"])
def test_a_code_that_no_ternary_weight_has_is_refused(name):
    chosen = tensor_type(name)
    encoded = encode(ternary(), chosen, "tensor")
    data = encoded.data.clone()
    data[2, 5] |= 0b11
    with pytest.raises(InputError, match=f"blk: {name} holds the codes"):
        decode(data, chosen, 512, 0.5, "blk")


def test_a_byte_that_is_no_five_trits_is_refused():
    data = encode(ternary(), tensor_type("TQ1_0"), "tensor").data.clone()
    data[2, 5] = 1
    with pytest.raises(InputError, match="no five trits"):
        decode(data, tensor_type("TQ1_0"), 512, 0.5, "blk")


@pytest.mark.parametrize(
    ("name", "d"),
    [(name, d) for name in ("TQ2_0", "Q2_0", "Q1_0") for d in (float("nan"), float("inf"), -1.0)]
    + [(name, d) for name in ("Q4_0", "Q8_0") for d in (float("nan"), float("inf"))],  # there d may be negative
)
def test_block_scales_that_are_no_scales_are_refused(name, d):
    weight = integers(4, 32, zero=False) if name in ("Q4_0", "Q8_0") else ternary(levels=2 if name == "Q1_0" else 3)
    data = encode(weight, tensor_type(name), "block").data.clone()
    at = data.shape[1] - 2 if name == "TQ2_0" else 0
    data[1, at : at + 2] = torch.tensor([d], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(InputError, match="blk"):
        decode(data, tensor_type(name), weight.shape[1], None, "blk")


def test_with_a_scale_beside_it_every_blocks_own_scale_must_be_one():
    data = encode(ternary(), tensor_type("TQ2_0"), "block").data
    with pytest.raises(InputError, match="every block's scale must be 1"):
        decode(data, tensor_type("TQ2_0"), 512, 0.5, "blk")


def test_a_block_of_zeros_may_have_the_scale_zero_that_llama_cpp_gives_it():
    values = torch.zeros(2, 512)
    values[1, 256:] = 0.5
    weight = absmax_blocks(values, "TQ2_0")
    assert torch.equal(decode(weight.data, tensor_type("TQ2_0"), 512, None, "w").dequantize(), values)


def test_sizes_are_those_of_the_types():
    assert [TYPES[name].bits for name in ("TQ2_0", "TQ1_0", "Q2_0", "Q1_0", "I2_S", "Q4_0", "Q8_0")] == [
        2.0625,
        1.6875,
        2.25,
        1.125,
        2.0,
        4.5,
        8.5,
    ]
    known = {each.name: each for each in gguf.GGMLQuantizationType}
    for name, each in TYPES.items():
        if name in known:
            assert each.number == known[name].value
            assert (each.block, each.nbytes) == gguf.GGML_QUANT_SIZES[known[name]]
    assert i2_s_tail(0.5).tolist() == [0, 0, 0, 63, *[0] * 28]


@pytest.mark.parametrize("columns", [1, 3])
def test_odd_codes_around_zero_go_into_four_bits(columns):
    codes = torch.tensor([-3, -1, 1, 3], dtype=torch.int8).repeat(2, 8 * columns)
    weight = QTensor(codes, torch.full((1, 1), 0.0371), levels=4, odd=True)
    chosen = type_for(weight, "auto", "tensor")
    assert chosen.name == "Q4_0"
    encoded = encode(weight, chosen, "tensor")
    assert torch.equal(decode(encoded.data, chosen, 32 * columns, encoded.scale, "w").dequantize(), weight.dequantize())


def test_codes_that_fit_no_type_name_a_method_whose_codes_do():
    with pytest.raises(InputError, match=r"ptq=absmax"):
        type_for(integers(8, None, zero=True), "auto", "tensor")
