"""Latent weights that a layer's quantizer rounds to given codes."""

from functools import partial

import pytest
import torch

from bitnet.errors import InputError
from bitnet.quant import LSQ, SEQ, Grid, LearnedScale, absmax, absmean_ternary, centred_sign
from bitnet.quant.latent import latent_weight
from bitnet.quant.layer_grid import LayerGrid

GRANULARITIES = ("tensor", "row", 20)  # 20: the last group of 75 columns is narrower
QUANTIZERS = {
    f"{name}-{granularity}": make(granularity)
    for granularity in GRANULARITIES
    for name, make in {
        "absmean": lambda g: partial(absmean_ternary, granularity=g),
        "sign": lambda g: partial(centred_sign, granularity=g),
        "seq2": lambda g: SEQ(2, g),
        "seq1.58": lambda g: SEQ(1.58, g),
        "lsq2": lambda g: LSQ(2, g),
        "lsq4": lambda g: LSQ(4, g),
        "int4": lambda g: Grid(4, True, g),
        "int8": lambda g: Grid(8, True, g),
        "ternary": lambda g: Grid(1.58, True, g, scale_dtype="float32"),
    }.items()
}
EVERY = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS.keys())


@pytest.fixture
def weight():
    """Normal, 37x75, a row of zeros and an outlier."""
    weight = torch.randn(37, 75) * 0.02
    weight[3, 5], weight[7] = 0.5, 0
    return weight


def answer(quantizer, latent, scale):
    """What a layer with this latent weight computes with."""
    learned = isinstance(quantizer, LSQ | SEQ)
    return LearnedScale(quantizer, scale)(latent) if learned else quantizer(latent)


def nearest_codes(grid, weight, scale):
    return grid.nearest(weight / grid.columns(scale, weight.shape[1]))


def moved_codes(grid, weight, scale):
    """The nearest codes, a third of them one step up, a third one step down; a maximum's outer codes stay."""
    codes = nearest_codes(grid, weight, scale)
    step = (2 if grid.odd else 1) * torch.randint(-1, 2, codes.shape)
    outer = (codes.abs() == grid.high) if grid.scale_from == "maximum" else torch.zeros_like(codes, dtype=torch.bool)
    return torch.where(outer, codes, (codes + step).clamp(grid.low, grid.high))


def squared_error(quantized, weight):
    return float((quantized.dequantize() - weight).square().sum())


@EVERY
@pytest.mark.parametrize("choose", [nearest_codes, moved_codes])
def test_the_layers_quantizer_answers_with_the_codes_and_the_scale_that_were_chosen(quantizer, choose, weight):
    grid = LayerGrid.of(quantizer)
    scale = grid.fit(weight)
    codes = choose(grid, weight, scale)
    answered = answer(quantizer, latent_weight(grid, weight, codes, scale), scale)
    assert torch.equal(answered.qdata.float(), codes)
    torch.testing.assert_close(answered.scale.float(), scale, rtol=2e-6, atol=0)


@EVERY
@pytest.mark.parametrize("shape", [(1, 75), (37, 1), (1, 2)])
def test_thin_matrices_have_latent_weights_too(quantizer, shape):
    weight = torch.randn(shape)
    weight[0, 0], weight[-1, -1] = (
        1.0,
        -1.0,
    )  # signs of both kinds: signs all alike are nothing that `centred_sign` says
    grid = LayerGrid.of(quantizer)
    scale = grid.fit(weight)
    codes = nearest_codes(grid, weight, scale)
    latent = latent_weight(grid, weight, codes, scale)
    if not (grid.odd and grid.scale_from == "mean" and grid.granularity != "tensor"):
        assert torch.equal(answer(quantizer, latent, scale).qdata.float(), codes)


@EVERY
def test_zeros_stay_zeros(quantizer):
    weight = torch.zeros(5, 24)
    grid = LayerGrid.of(quantizer)
    scale = grid.fit(weight)
    latent = latent_weight(grid, weight, nearest_codes(grid, weight, scale), scale)
    assert latent.abs().max() < 1e-4
    assert answer(quantizer, latent, scale).dequantize().abs().max() < 1e-4


def test_a_weight_that_rounds_to_its_code_keeps_its_value(weight):
    grid = LayerGrid.of(LSQ(2, "row"))
    scale = grid.fit(weight)
    codes = moved_codes(grid, weight, scale)
    latent = latent_weight(grid, weight, codes, scale)
    units = weight / scale
    inside = (nearest_codes(grid, weight, scale) == codes) & ((units - codes).abs() < 0.499)
    assert inside.float().mean() > 0.2
    torch.testing.assert_close(latent[inside], weight[inside], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("depth", "place"), [(0.25, 0.375), (1.0, 0.0)])
def test_a_weight_that_was_moved_lies_as_deep_in_its_cell_as_asked_for(depth, place, weight):
    grid = LayerGrid.of(LSQ(4, "row"))
    scale = grid.fit(weight)
    codes = moved_codes(grid, weight, scale)
    moved = nearest_codes(grid, weight, scale) != codes
    offset = (latent_weight(grid, weight, codes, scale, depth) / scale - codes)[moved]
    torch.testing.assert_close(offset.abs(), torch.full_like(offset, place), rtol=1e-4, atol=1e-5)
    assert (offset * (weight / scale - codes)[moved] > -1e-5).all()  # on the side that it came from


@pytest.mark.parametrize("name", ["int4-tensor", "int4-row", "int4-20"])
def test_a_scale_above_the_covering_one_is_had_by_an_outer_code_that_was_rounded_up_to(name):
    weight = torch.randn(6, 40)
    grid = LayerGrid.of(QUANTIZERS[name])
    scale = grid.stored(grid.covering(weight) * 1.05)  # the largest weight is 6.67 steps
    codes = nearest_codes(grid, weight, scale)
    answered = answer(QUANTIZERS[name], latent_weight(grid, weight, codes, scale), scale)
    assert torch.equal(answered.qdata.float(), codes)
    torch.testing.assert_close(answered.scale.float(), scale, rtol=2e-6, atol=0)


def test_a_ternary_weight_that_became_zero_lies_as_deep_in_its_cell_as_asked_for(weight):
    grid = LayerGrid.of(absmean_ternary)
    scale = grid.fit(weight)
    before = nearest_codes(grid, weight, scale)
    codes = before * (torch.rand(weight.shape) < 0.7)
    moved = (before != 0) & (codes == 0)
    latent = latent_weight(grid, weight, codes, scale, 0.25)
    torch.testing.assert_close(latent[moved], before[moved] * 0.375 * scale.item(), rtol=1e-5, atol=0)


def test_ternary_weights_keep_the_order_of_their_magnitudes():
    weight = torch.randn(64, 48) * 0.02
    grid = LayerGrid.of(absmean_ternary)
    scale = grid.fit(weight)
    latent = latent_weight(grid, weight, nearest_codes(grid, weight, scale), scale)
    order = weight.flatten().argsort()
    assert (latent.flatten()[order].diff() >= 0).all()
    zeros = nearest_codes(grid, weight, scale) == 0
    torch.testing.assert_close(latent[zeros], weight[zeros])


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name.endswith("tensor")])
def test_the_fitted_scale_is_no_worse_than_the_best_of_a_fine_search(name, weight):
    grid = LayerGrid.of(QUANTIZERS[name])
    for values in (weight[:3, :20], torch.randn(6, 20) ** 3):
        errors = [
            float((nearest_codes(grid, values, scale) * scale - values).square().sum())
            for scale in (grid.fit(values), *(grid.covering(values) * share for share in torch.linspace(0.01, 1, 400)))
        ]
        assert errors[0] <= min(errors) * 1.1  # of two minima that are nearly as deep it may find either


def test_important_columns_pull_the_scale(weight):
    weight = torch.cat([torch.full((4, 8), 0.1), torch.full((4, 8), 0.25)], 1)
    grid = LayerGrid.of(SEQ(1.58, "row"))
    importance = torch.tensor([1.0] * 8 + [1e-6] * 8)
    torch.testing.assert_close(grid.fit(weight, importance), torch.full((4, 1), 0.1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("quantizer", [QUANTIZERS["absmean-20"], QUANTIZERS["int4-20"], QUANTIZERS["seq2-row"]])
def test_nothing_that_is_given_is_changed(quantizer, weight):
    grid = LayerGrid.of(quantizer)
    before = weight.clone()
    scale = grid.fit(weight)
    codes = nearest_codes(grid, weight, scale)
    given = codes.clone(), scale.clone()
    latent_weight(grid, weight, codes, scale)
    assert torch.equal(weight, before)
    assert torch.equal(codes, given[0])
    assert torch.equal(scale, given[1])


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (absmax, r"got the quantizer absmax: set init=none"),
        (Grid(4), r"set quantizer.symmetric=true"),
        (Grid(4, True, range="mse"), r"quantizer.range=mse would move it: set quantizer.range=minmax"),
    ],
)
def test_a_quantizer_whose_scale_cannot_be_arranged_for_is_refused(quantizer, message):
    with pytest.raises(InputError, match=message):
        LayerGrid.of(quantizer)


@pytest.mark.parametrize("depth", [0, 1.5, True])
def test_a_depth_that_is_no_place_inside_a_cell_is_refused(depth, weight, unchecked):
    grid = LayerGrid.of(LSQ(4))
    with pytest.raises(InputError, match=r"init.depth must be above 0"):
        latent_weight(grid, weight, weight, grid.fit(weight), depth)
