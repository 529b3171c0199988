"""Half-quadratic quantization: the zero point moves, the scale stays."""

import pytest
import torch

from bitnet.errors import InputError
from bitnet.nn.quantized_linear import QuantizedLinear
from bitnet.ptq import HQQ, RoundToNearest


def tailed(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[0, 0], weight[-1, -1] = 0.0, 0.2
    return weight


def reference(group: torch.Tensor, bits: int) -> tuple[torch.Tensor, float, float]:
    """Codes, scale and zero point of one group, from the paper, residuals in steps."""
    low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
    scale = torch.tensor((high - low) / (2**bits - 1)).half().float().item()
    half, beta, tried = 2 ** (bits - 1), 10.0, []
    w = group.float() / scale
    zero = max(-low / scale, 0.0) - half
    for _ in range(21):
        stored = torch.tensor(zero).half().float()
        q = (w + stored).round().clamp(-half, half - 1)
        r = w - (q - stored)
        tried.append((float((r.abs() ** 0.7).sum()), stored.item()))
        e = r.sign() * (r.abs() - r.abs().clamp(min=1e-9) ** -0.3 / beta).clamp(min=0)
        zero = float((q - (w - e)).mean())
        beta *= 1.01
    zero = min(tried)[1]
    return (w + zero).round().clamp(-half, half - 1), scale, zero


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("columns", [64, 150])
def test_every_group_is_the_one_of_the_paper(bits, columns):
    weight = tailed(5, columns)
    q = HQQ(bits, granularity=64).quantize(weight, None)
    for row in range(5):
        for group in range(-(-columns // 64)):
            span = slice(64 * group, 64 * group + 64)
            codes, scale, zero = reference(weight[row, span], bits)
            assert q.scale[row, group].item() == pytest.approx(scale, rel=1e-3)
            assert q.zero_point[row, group].item() == pytest.approx(zero, abs=0.02)
            assert (q.qdata[row, span].float() != codes).float().mean() <= 0.05  # sums round: a zero point may too


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_errs_less_than_rounding_to_nearest_with_the_same_scale(bits):
    weight = tailed(32, 128)
    ours, theirs = (
        (method.quantize(weight, None).dequantize() - weight).abs()
        for method in (HQQ(bits), RoundToNearest(symmetric=False, bits=bits, granularity=64))
    )
    assert ours.pow(0.7).sum() < 0.99 * theirs.pow(0.7).sum()
    assert ours.square().sum() < theirs.square().sum()


@pytest.mark.parametrize("granularity", [32, "row", "tensor"])
def test_codes_are_the_nearest_of_the_values_as_stored(granularity):
    weight = tailed(6, 70)
    q = HQQ(3, granularity).quantize(weight, None)
    assert q.scale.dtype == q.zero_point.dtype == torch.float16
    values = q.dequantize()
    for code in range(-4, 4):
        other = type(q)(torch.full_like(q.qdata, code), q.scale, q.zero_point, q.levels, q.group_size).dequantize()
        assert ((weight - values).abs() <= (weight - other).abs() * (1 + 1e-4) + 1e-7).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 1), (1, 300), (6, 37)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_has_values_near_the_weights_and_16_bit_weights_the_codes_of_float32(rows, columns, dtype):
    weight = tailed(rows, columns).to(dtype)
    before = weight.clone()
    q = HQQ(bits=8).quantize(weight, None)
    assert q.shape == weight.shape
    assert (q.dequantize() - weight.float()).abs().max() <= 0.2 / 100
    assert torch.equal(q.qdata, HQQ(bits=8).quantize(weight.float(), None).qdata)
    assert torch.equal(weight, before)


def test_zeros_stay_nearly_zero():
    weight = tailed(4, 64)
    weight[1] = 0.0
    assert HQQ(2).quantize(weight, None).dequantize()[1].abs().max() <= 1e-6
    assert torch.isfinite(HQQ(2).quantize(torch.zeros(3, 70), None).dequantize()).all()


def test_matrices_are_read_in_pieces_with_the_same_codes(monkeypatch):
    weight = tailed(9, 100)
    whole = HQQ(3).quantize(weight, None)
    monkeypatch.setattr("bitnet.ptq.hqq.CHUNK", 200)
    assert torch.equal(HQQ(3).quantize(weight, None).qdata, whole.qdata)


def test_scales_and_zero_points_are_counted_as_stored():
    assert HQQ(4, 64).quantize(tailed(8, 128), None).bits_per_weight == 4 + 32 / 64
    assert HQQ(2, 64, scale_dtype="float32").quantize(tailed(8, 128), None).bits_per_weight == 2 + 64 / 64


def test_a_layer_holds_its_tensors():
    weight, x = tailed(8, 70), torch.randn(3, 70)
    q = HQQ(3).quantize(weight, None)
    layer = QuantizedLinear(q)
    assert set(layer.state_dict()) == {"qdata", "weight_scale", "weight_zero_point"}
    assert torch.equal(layer.bfloat16().weight.dequantize(), q.dequantize())
    assert torch.equal(layer(x), x @ q.dequantize().t())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 1}, "bits must be 2 to 8"), ({"granularity": -1}, "granularity"), ({"scale_dtype": "int8"}, "float16")],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        HQQ(**options)


def test_weights_that_have_no_codes_are_refused():
    weight = tailed(4, 8)
    weight[0, 1] = float("nan")
    with pytest.raises(InputError, match="NaN or infinity"):
        HQQ().quantize(weight, None)
    with pytest.raises(InputError, match="scale_dtype to bfloat16"):
        HQQ().quantize(tailed(4, 8) * 1e9, None)
