"""The bytes of GGUF's block formats, against gguf-py's dequantizers."""

import gguf
import numpy as np
import pytest
import torch

from bitnet.errors import InputError
from bitnet.nn import QuantizedLinear
from bitnet.quant import QuantizedWeight
from bitnet.quant.ggml import FORMATS, GGMLWeight, block_format, pack, unpack

TYPES = sorted(FORMATS)


def random_bytes(name: str, rows: int, blocks: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, blocks * FORMATS[name].nbytes)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.int32).to(torch.uint8)


def by_gguf(data: torch.Tensor, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):  # float16 infinities among the random bytes
        return gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("name", TYPES)
def test_a_block_has_the_size_that_gguf_says(name):
    form = FORMATS[name]
    assert (form.block, form.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_have_the_values_that_gguf_gives_them_bit_for_bit(name, seed):
    data = random_bytes(name, 7, 5, seed)
    ours = GGMLWeight(data, name, 5 * FORMATS[name].block).dequantize()
    np.testing.assert_array_equal(ours.numpy(), by_gguf(data, name))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("byte", [0, 1, 127, 128, 251, 255])
def test_blocks_of_one_repeated_byte_have_the_values_that_gguf_gives_them(name, byte):
    data = torch.full((1, 2 * FORMATS[name].nbytes), byte, dtype=torch.uint8)
    ours = GGMLWeight(data, name, 2 * FORMATS[name].block).dequantize()
    np.testing.assert_array_equal(ours.numpy(), by_gguf(data, name))


@pytest.mark.parametrize("name", [each for each in TYPES if each != "TQ1_0"])  # 13 bytes of it are no five trits
def test_unpacking_any_bytes_and_packing_them_again_gives_the_same_bytes(name):
    data = random_bytes(name, 6, 4)
    if name == "Q8_0":
        data[data == 128] = 129  # -128 is no code of Q8_0
    if name == "TQ2_0":
        data = data & 0b10101010  # nor is 3 one of TQ2_0
    assert torch.equal(pack(unpack(data, name), name), data)


def test_every_combination_of_five_trits_survives_tq1_0():
    combinations = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * 5)  # [243, 5]
    fields = unpack(random_bytes("TQ1_0", 243, 1), "TQ1_0")
    for byte in (0, 31):
        fields.codes[:, 0, byte : byte + 160 : 32] = combinations
    for byte in (0, 15):
        fields.codes[:, 0, 160 + byte : 240 : 16] = combinations
    for byte in (0, 3):
        fields.codes[:, 0, 240 + byte :: 4] = combinations[:, :4]
    again = unpack(pack(fields, "TQ1_0"), "TQ1_0")
    assert torch.equal(again.codes, fields.codes)
    assert torch.equal(again.d.view(torch.int16), fields.d.view(torch.int16))


@pytest.mark.parametrize("name", TYPES)
def test_a_code_outside_the_range_is_refused(name):
    fields = unpack(torch.zeros(1, FORMATS[name].nbytes, dtype=torch.uint8), name)
    fields.codes[0, 0, 3] = FORMATS[name].low - 1
    with pytest.raises(InputError, match=f"codes of {name} are"):
        pack(fields, name)


def test_a_scale_or_minimum_outside_its_six_bits_is_refused():
    fields = unpack(torch.zeros(1, 144, dtype=torch.uint8), "Q4_K")
    assert fields.scales is not None
    assert fields.mins is not None
    fields.scales[0, 0, 7] = 64
    with pytest.raises(InputError, match="scales of Q4_K are 0 to 63"):
        pack(fields, "Q4_K")
    fields.scales[0, 0, 7], fields.mins[0, 0, 0] = 0, -1
    with pytest.raises(InputError, match="minima of Q4_K are 0 to 63"):
        pack(fields, "Q4_K")


@pytest.mark.parametrize("name", TYPES)
def test_a_row_that_ends_within_a_block_pays_for_the_whole_block_and_cannot_be_exported(name):
    form = block_format(name)
    data = random_bytes(name, 3, 2)
    whole, part = GGMLWeight(data, name, 2 * form.block), GGMLWeight(data, name, form.block + 1)
    assert whole.exportable
    assert not part.exportable
    assert whole.bits_per_weight == form.bits
    assert part.bits_per_weight == 2 * form.nbytes * 8 / (form.block + 1)
    assert part.shape == part.dequantize().shape == (3, form.block + 1)
    np.testing.assert_array_equal(part.dequantize().numpy(), whole.dequantize()[:, : form.block + 1].numpy())


def test_rows_of_the_wrong_length_and_unknown_types_are_refused():
    with pytest.raises(InputError, match="256 columns of Q2_K take 84 bytes a row, got 83"):
        GGMLWeight(torch.zeros(1, 83, dtype=torch.uint8), "Q2_K", 256)
    with pytest.raises(InputError, match="type must be one of Q2_K"):
        GGMLWeight(torch.zeros(1, 84, dtype=torch.uint8), "Q2_L", 256)
    with pytest.raises(InputError, match="rows of Q2_K are a multiple of 84 bytes, got 83"):
        unpack(torch.zeros(1, 83, dtype=torch.uint8), "Q2_K")


def test_it_lives_in_a_quantized_linear_and_answers_with_its_values():
    data = torch.zeros(2, 84, dtype=torch.uint8)
    data[:, :80] = random_bytes("Q2_K", 2, 1)[:, :80]
    data[:, 80:] = torch.tensor([0.5, 0.25], dtype=torch.float16).view(torch.uint8)
    weight = GGMLWeight(data, "Q2_K", 200)
    assert isinstance(weight, QuantizedWeight)
    x = torch.randn(3, 200)
    assert torch.equal(QuantizedLinear(weight)(x), x @ weight.dequantize().T)
