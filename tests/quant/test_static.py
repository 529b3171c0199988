"""Activations in a range that calibration fixed."""

import copy

import pytest
import torch

from bitnet.errors import InputError
from bitnet.nn.quantized_linear import QuantizedLinear
from bitnet.quant import FixedRange, Histogram, StaticActivation, absmax, zero_point


def inputs() -> torch.Tensor:
    x = torch.randn(4, 50, 24, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3] = 9.0
    x[0, 0, 0] = 0.0
    return x


def calibrated(spec: StaticActivation, x: torch.Tensor) -> FixedRange:
    histogram = Histogram()
    for batch in x:
        histogram.update(batch)
    return spec.calibrated(histogram)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("symmetric", "dynamic"), [(True, absmax), (False, zero_point)])
def test_on_its_calibration_text_the_full_range_is_the_dynamic_one_of_the_tensor(bits, symmetric, dynamic):
    x = inputs()
    q = calibrated(StaticActivation(bits, symmetric), x)(x)
    expected = dynamic(x, bits=bits, granularity="tensor")
    assert torch.equal(q.qdata, expected.qdata)
    torch.testing.assert_close(q.scale, expected.scale)
    assert (q.zero_point is None) == symmetric
    assert q.levels == expected.levels


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_beyond_the_range_take_its_ends(symmetric):
    quantizer = calibrated(StaticActivation(symmetric=symmetric), inputs())
    low = -127 if symmetric else -128
    assert quantizer(torch.tensor([[1e6, -1e6]])).qdata.tolist() == [[127, low]]
    assert quantizer(torch.tensor([0.0])).dequantize().item() == 0.0


@pytest.mark.parametrize("range", ["percentile", "mse", "entropy"])
def test_clipping_errs_less_on_most_values(range):
    x = inputs()
    full, clipped = (calibrated(StaticActivation(4, range=each, percentile=99.0), x) for each in ("minmax", range))
    errors = [(q(x).dequantize() - x).abs().median() for q in (full, clipped)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_serves_as_the_activation_of_a_quantized_linear(symmetric):
    x, weight = inputs(), absmax(torch.randn(8, 24), bits=8)
    quantizer = calibrated(StaticActivation(symmetric=symmetric), x)
    layer = QuantizedLinear(weight, activation=quantizer)
    torch.testing.assert_close(layer(x), quantizer(x).dequantize() @ weight.dequantize().t(), rtol=1e-5, atol=1e-5)
    assert "activation.scale" in layer.state_dict()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_not_lost(bad):
    x = inputs()[0]
    quantizer = calibrated(StaticActivation(), x)
    x[3, 4] = bad
    assert quantizer(x).dequantize().isnan().all()


def test_the_scale_stays_in_float32_when_the_model_changes_its_dtype():
    quantizer = calibrated(StaticActivation(), inputs())
    before = copy.deepcopy(quantizer.state_dict())
    model = torch.nn.Sequential(quantizer, torch.nn.Linear(2, 2)).bfloat16()
    assert model[1].weight.dtype == torch.bfloat16
    assert quantizer.scale.dtype == torch.float32
    assert torch.equal(quantizer.scale, before["scale"])
    assert quantizer.zero_point.dtype == torch.int8


def test_a_saved_range_loads_into_another():
    one, other = calibrated(StaticActivation(), inputs()), calibrated(StaticActivation(), inputs() * 3 + 1)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(inputs()).qdata, other(inputs()).qdata)


def test_inputs_that_are_all_zero_have_a_range():
    assert (calibrated(StaticActivation(), torch.zeros(2, 3))(torch.zeros(2, 3)).dequantize() == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 1}, "bits must be 2 to 8"), ({"range": "absmean"}, "absmean"), ({"range": "x"}, "range must be one of")],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        StaticActivation(**options)


def test_a_layer_that_saw_no_text_cannot_be_calibrated():
    with pytest.raises(InputError, match="empty histogram"):
        StaticActivation().calibrated(Histogram())
