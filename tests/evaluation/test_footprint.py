import math

import pytest
import torch
from torch import nn

from bitnet.errors import InputError
from bitnet.evaluation import footprint
from bitnet.nn import BitLinear, BitLinear158, QuantizedLinear, convert, freeze
from bitnet.quant import absmax


class Language(nn.Module):
    """An embedding, one block of two linears and a norm, and a head."""

    def __init__(self, vocab: int = 20, width: int = 13, tied: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.up = nn.Linear(width, 7, bias=bias)
        self.down = nn.Linear(7, width, bias=bias)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("rotary", torch.zeros(1000), persistent=False)
        self.register_buffer("statistic", torch.zeros(3, dtype=torch.int16))
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight


def test_a_dense_model_takes_the_bits_of_its_saved_tensors():
    for model in (Language(), Language().bfloat16()):
        expected = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        assert footprint(model).bytes == expected
        assert footprint(model).bits_per_weight == 8 * model.up.weight.element_size()


def test_a_tied_weight_counts_once():
    model = Language(tied=True)
    assert footprint(Language()).bytes - footprint(model).bytes == 20 * 13 * 4
    assert [layer.name for layer in footprint(model).layers] == ["up", "down"]


def test_a_latent_layer_counts_its_float_weight():
    model = Language()
    dense = footprint(model)
    convert(model)
    latent = footprint(model)
    assert latent.total_bits == dense.total_bits
    assert [layer.kind for layer in latent.layers] == ["latent", "latent", "dense"]
    assert latent.bits_per_weight == 32


def test_a_frozen_ternary_layer_counts_packed_codes_and_its_scale():
    model = Language()
    convert(model)
    before = footprint(model)
    freeze(model)
    after = footprint(model)
    up, down, head = after.layers
    assert up.bits == 7 * math.ceil(13 / 5) * 8 + 32  # five trits a byte, every row in whole bytes, one float32 scale
    assert down.bits == 13 * math.ceil(7 / 5) * 8 + 32
    assert (up.kind, head.kind, head.bits_per_weight) == ("quantized", "dense", 32.0)
    assert after.bits_per_weight == (up.bits + down.bits) / (7 * 13 * 2)
    assert before.total_bits - after.total_bits == 2 * 7 * 13 * 32 - up.bits - down.bits
    assert before.n_parameters == after.n_parameters


def test_one_bit_layers_count_one_bit_and_their_scale():
    model = nn.Sequential(BitLinear(64, 32))
    freeze(model)
    assert footprint(model).bits_per_weight == 1 + 32 / (64 * 32)


def test_every_scale_of_a_group_counts():
    layer = QuantizedLinear(absmax(torch.randn(8, 64), bits=4, granularity=16))
    (found,) = footprint(nn.Sequential(layer)).layers
    assert found.bits == 8 * 64 * 4 + 8 * 4 * 32


def test_a_model_without_memory_can_be_counted():
    with torch.device("meta"):
        model = Language()
    assert footprint(model) == footprint(Language())


def test_the_rows_add_up_to_the_whole():
    model = Language()
    convert(model)
    freeze(model)
    found = footprint(model)
    *parts, whole = found.rows()
    n_bytes = [int(row[-1].replace(",", "")) for row in parts]
    assert sum(n_bytes) == pytest.approx(int(whole[-1].replace(",", "")), abs=len(parts))  # each rounded up
    assert [row[0] for row in parts] == ["up", "down", "lm_head", "everything else"]
    assert parts[0][1:4] == ("quantized", "7x13", f"{found.layers[0].bits_per_weight:.4f}")


def test_a_model_without_linears_is_refused():
    with pytest.raises(InputError, match="linear layers"):
        footprint(nn.Sequential(nn.Embedding(3, 4)))


def test_a_158_bit_layer_of_a_real_shape_takes_its_advertised_bits():
    model = nn.Sequential(BitLinear158(640, 256))
    freeze(model)
    assert footprint(model).bits_per_weight == pytest.approx(1.6, abs=1e-3)
