"""bitsandbytes' formats against dequantizers of our own, and every byte of them."""

import sys

import pytest
import torch

from bitnet.errors import InputError
from bitnet.nn.quantized_linear import QuantizedLinear
from bitnet.ptq import BitsAndBytes4Bit, LLMInt8

pytest.importorskip("bitsandbytes", reason="an optional dependency")


def tailed(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[0, 0], weight[-1, -1] = 0.0, 0.4
    return weight


def nf4_values() -> torch.Tensor:
    """8 positive and 7 negative quantiles of the normal distribution and zero (arXiv:2305.14314, app. E)."""
    normal, offset = torch.distributions.Normal(0, 1), 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1), positive.flip(0)])
    return (values / values.max()).float()


def fp4_values() -> torch.Tensor:
    """Sign, exponent e, mantissa m: m/16 * 2^-3 ... as multiples of 12, by code."""
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return torch.cat([magnitudes, -magnitudes])


def dequantized(q) -> torch.Tensor:
    """By the drawing in the class's docstring."""
    n = q.shape.numel()
    codes = torch.stack([q.packed >> 4, q.packed & 15], -1).flatten()[:n].long()
    absmax = q.absmax
    if q.nested_absmax is not None:
        blocks = torch.arange(len(absmax)) // 256
        absmax = q.nested_codebook[absmax.long()] * q.nested_absmax[blocks] + q.nested_mean
    values = nf4_values() if q.format == "nf4" else fp4_values()
    return (values[codes] * absmax[torch.arange(n) // q.block_size]).reshape(q.shape)


SHAPES = [(1, 1), (5, 13), (3, 64), (70, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_values_are_those_of_an_independent_dequantizer(shape, format, double_quant):
    q = BitsAndBytes4Bit(format, double_quant=double_quant).quantize(tailed(*shape), None)
    torch.testing.assert_close(q.dequantize(), dequantized(q), rtol=1e-5, atol=1e-7)
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("format", "values"), [("nf4", nf4_values()), ("fp4", fp4_values())])
def test_every_weight_has_the_nearest_value_of_its_block(shape, format, values):
    weight = tailed(*shape)
    q = BitsAndBytes4Bit(format, block_size=64).quantize(weight, None)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).reshape(-1, 64)
    absmax = flat.abs().amax(1, keepdim=True)
    best = (flat[..., None] - absmax[..., None] * values).abs().amin(-1).flatten()[: weight.numel()]
    error = (q.dequantize() - weight).abs().flatten()
    torch.testing.assert_close(error, best, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("double_quant", [False, True])
def test_every_stored_byte_is_counted(double_quant):
    q = BitsAndBytes4Bit(double_quant=double_quant, block_size=64).quantize(tailed(5, 1001), None)
    blocks = -(-5005 // 64)
    stored = 8 * 2503 + 16 * 32 + (blocks * 8 + 1 * 32 + 256 * 32 + 32 if double_quant else blocks * 32)
    assert q.bits_per_weight == stored / 5005


@pytest.mark.parametrize("method", [BitsAndBytes4Bit("nf4"), BitsAndBytes4Bit("fp4", double_quant=True), LLMInt8()])
def test_zeros_stay_zeros_and_16_bit_weights_have_the_codes_of_their_float32_values(method):
    weight = tailed(6, 128).bfloat16()
    weight[2] = 0.0
    before = weight.clone()
    q = method.quantize(weight, None)
    assert torch.equal(q.dequantize(), method.quantize(weight.float(), None).dequantize())
    assert torch.equal(weight, before)
    if not getattr(method, "double_quant", False):  # its mean of all magnitudes does not give back a zero exactly
        assert (q.dequantize()[2] == 0).all()
    assert (method.quantize(torch.zeros(3, 70), None).dequantize() == 0).all()


def test_a_layer_keeps_blocks_in_its_state_and_multiplies_by_their_values():
    weight, x = tailed(8, 48), torch.randn(3, 48)
    q = BitsAndBytes4Bit(double_quant=True).quantize(weight, None)
    layer = QuantizedLinear(q)
    assert torch.equal(layer(x), x @ q.dequantize().t())
    assert torch.equal(layer.weight.dequantize(), q.dequantize())


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_codes_are_bitsandbytes_own(shape):
    import bitsandbytes.functional as functional

    weight = tailed(*shape)
    if shape != (1, 1):
        codes, largest, _ = functional.int8_vectorwise_quant(weight.clone())
        q = LLMInt8().quantize(weight, None)
        assert torch.equal(q.qdata, codes)
        assert torch.equal(q.scale[:, 0], largest / 127)
        assert q.bits_per_weight == 8 + 32 / shape[1]


def with_outliers() -> torch.Tensor:
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    x[0] *= 0.1  # an outlier must not become the scale of its token, and nothing else may
    x[0, 3, 5], x[1, 8, 20] = 40.0, -6.0
    return x


def test_int8_inputs_keep_outlier_features_in_float_and_leave_them_out_of_the_scales():
    import bitsandbytes.functional as functional

    x = with_outliers()
    q = LLMInt8().activation(x)
    codes, largest, columns = functional.int8_vectorwise_quant(x.flatten(0, 1).clone(), threshold=6.0)
    assert columns.tolist() == [5, 20]
    assert torch.equal(q.qdata.flatten(0, 1), codes)
    assert torch.equal(q.scale.flatten(), largest / 127)
    assert torch.equal(q.dequantize()[..., [5, 20]], x[..., [5, 20]])


def test_threshold_0_keeps_no_outliers():
    q = LLMInt8(threshold=0.0).activation(with_outliers())
    assert (q.outliers == 0).all()
    assert q.qdata[0, 3, 5] == 127


def test_a_layer_multiplies_codes_and_outliers():
    weight, x = tailed(16, 32), with_outliers()
    method = LLMInt8()
    layer = QuantizedLinear(method.quantize(weight, None), activation=method.activation)
    plain = QuantizedLinear(layer.weight, activation=LLMInt8(threshold=0.0).activation)
    exact = x @ layer.weight.dequantize().t()
    assert (layer(x) - exact).square().mean() < 0.5 * (plain(x) - exact).square().mean()
    torch.testing.assert_close(layer(x), method.activation(x).dequantize() @ layer.weight.dequantize().t())


@pytest.mark.parametrize("method", [BitsAndBytes4Bit(), LLMInt8()])
def test_without_bitsandbytes_the_error_says_what_to_install(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        method.quantize(tailed(2, 4), None)


@pytest.mark.parametrize("method", [BitsAndBytes4Bit(), LLMInt8()])
def test_a_weight_that_is_not_finite_is_refused(method):
    weight = tailed(2, 4)
    weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="NaN or infinity"):
        method.quantize(weight, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitsAndBytes4Bit("int4"), "nf4 or fp4"),
        (lambda: BitsAndBytes4Bit(block_size=48), "block_size"),
        (lambda: LLMInt8(threshold=-1.0), "threshold"),
    ],
)
def test_options_that_do_not_fit_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
