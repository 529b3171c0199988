"""The search for fields: no worse than ggml's, whatever the input; and the reference quantizers, byte for byte.

``golden.json`` holds what ggml itself (as in llama-cpp-python 0.3.36) makes of `sample()`, without and with importance.
"""

import json
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from bitnet.errors import InputError
from bitnet.quant.ggml import (
    FORMATS,
    GGMLWeight,
    absmax_blocks,
    block_format,
    fit_fields,
    in_blocks,
    magnitude_weighted,
    pack,
    with_nearest_codes,
)

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
PLAIN = ["Q4_0", "Q8_0", "TQ1_0", "TQ2_0"]


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """[3, 512] weights with tails, zeros and an outlier, and the importance of the columns."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(3, 512, generator=generator) * 0.05
    weight[0, :40] = 0.0
    weight[1, 300] = 1.0
    weight[2] = weight[2].abs()
    return weight, torch.randn(512, generator=generator).square() + 0.01


def golden(name: str, which: str) -> GGMLWeight:
    data = torch.tensor(list(bytes.fromhex(GOLDEN[name][which])), dtype=torch.uint8)
    return GGMLWeight(data.view(3, -1), name, 512)


def quantized(weight: torch.Tensor, name: str, importance: torch.Tensor | None = None) -> GGMLWeight:
    form = block_format(name)
    return GGMLWeight.from_fields(fit_fields(weight, form, importance), name, weight.shape[1])


def row_errors(weight: torch.Tensor, q: GGMLWeight, v: torch.Tensor | float = 1.0) -> torch.Tensor:
    return ((weight - q.dequantize()) ** 2 * v).double().sum(-1)


def error(weight: torch.Tensor, q: GGMLWeight, v: torch.Tensor | float = 1.0) -> float:
    return float(row_errors(weight, q, v).sum())


@pytest.mark.parametrize("name", K_TYPES)
@pytest.mark.parametrize("which", ["plain", "importance"])
def test_for_the_scales_that_ggml_chose_the_codes_and_bytes_are_ggmls(name, which):
    theirs = golden(name, which)
    weight, _ = sample()
    fields = theirs.fields()
    ours = with_nearest_codes(fields, in_blocks(weight, theirs.format), theirs.format)
    idle = (fields.steps() == 0).repeat_interleave(theirs.format.sub, dim=-1)  # any code has the value 0 there
    assert 0 < idle.float().mean() < 0.2 or theirs.format.mins is not None
    ours.codes[idle] = fields.codes[idle]
    assert torch.equal(pack(ours, name), theirs.data)


@pytest.mark.parametrize("name", K_TYPES)
def test_the_squared_error_is_lower_than_ggmls(name):
    weight, _ = sample()
    assert (row_errors(weight, quantized(weight, name)) / row_errors(weight, golden(name, "plain"))).mean() < 1


@pytest.mark.parametrize("name", K_TYPES)
def test_the_weighted_error_is_lower_than_ggmls_with_an_importance_matrix(name):
    weight, mean_square = sample()
    v = magnitude_weighted(weight, block_format(name), mean_square)
    ratios = row_errors(weight, quantized(weight, name, v), v) / row_errors(weight, golden(name, "importance"), v)
    assert ratios.mean() < 1
    assert ratios.max() < 1.02  # Q3_K with the outlier of 20 standard deviations: 1.016


@pytest.mark.parametrize("name", K_TYPES)
def test_importance_lowers_the_error_that_it_weighs(name):
    weight, mean_square = sample()
    assert error(weight, quantized(weight, name, mean_square[None]), mean_square) < error(
        weight, quantized(weight, name), mean_square
    )


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_refining_never_raises_the_error(name):
    weight, mean_square = sample()
    form = block_format(name)
    errors = [
        error(weight, GGMLWeight.from_fields(fit_fields(weight, form, mean_square[None], n), name, 512), mean_square)
        for n in range(4)
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("columns", [1, 31, 256, 300])
def test_any_width_zeros_and_a_constant_are_quantized(name, columns):
    weight = torch.randn(4, columns) * 0.02
    weight[1], weight[2] = 0.0, 0.25
    q = quantized(weight, name)
    assert q.shape == weight.shape
    assert torch.equal(q.dequantize()[1], torch.zeros(columns))
    assert (q.dequantize()[2] - 0.25).abs().max() < 0.25 * 0.04
    assert error(weight, q) < error(weight, quantized(torch.zeros_like(weight), name))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_columns_that_fill_up_a_block_do_not_disturb_the_others(name):
    weight = torch.randn(3, 1) * 0.02 + 1
    assert (quantized(weight, name).dequantize() - weight).abs().max() < 1e-3  # one value: only float16 in its way


@pytest.mark.parametrize("name", ["Q2_K", "Q6_K", "TQ1_0"])
def test_rows_are_quantized_each_by_itself(name):
    weight, mean_square = sample()
    whole = quantized(weight, name, mean_square[None])
    for row in range(3):
        assert torch.equal(quantized(weight[row : row + 1], name, mean_square[None]).data, whole.data[row : row + 1])


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K"])
def test_columns_without_importance_leave_finite_values(name):
    weight, mean_square = sample()
    mean_square[:280] = 0.0
    assert torch.isfinite(quantized(weight, name, mean_square[None]).dequantize()).all()
    assert torch.isfinite(quantized(weight, name, torch.zeros(1, 512)).dequantize()).all()


def test_what_cannot_be_stored_is_refused():
    form = block_format("Q4_K")
    for bad in (float("nan"), float("inf"), 1e5):
        with pytest.raises(InputError, match="weights must be finite and at most 65504"):
            fit_fields(torch.full((1, 256), bad), form)
    with pytest.raises(InputError, match="importance must be finite and not negative"):
        fit_fields(torch.ones(1, 256), form, -torch.ones(1, 256))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("seed", range(4))
def test_the_reference_quantizers_give_the_bytes_of_gguf(name, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 512, generator=generator) * 0.05
    weight[0, :256], weight[1, 3], weight[2, :8] = 0.0, -2.0, torch.tensor([1.0, -1, 0.5, -0.5, 0.25, -0.25, 0, 1])
    weight[3] = weight[3].sign() * 0.02  # exact ternary values
    with np.errstate(divide="ignore"):
        theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(absmax_blocks(weight, name).data.numpy(), theirs)


@pytest.mark.parametrize("name", PLAIN)
def test_searching_has_a_lower_error_than_the_reference_quantizer(name):
    weight, _ = sample()
    assert error(weight, quantized(weight, name)) < error(weight, absmax_blocks(weight, name))


def test_a_k_quant_has_no_reference_rule_and_a_scale_beyond_float16_is_refused():
    with pytest.raises(InputError, match="Q2_K has no reference rule"):
        absmax_blocks(torch.ones(1, 256), "Q2_K")
    with pytest.raises(InputError, match="Q8_0 stores scales as float16"):
        absmax_blocks(torch.full((1, 32), 1e8), "Q8_0")
