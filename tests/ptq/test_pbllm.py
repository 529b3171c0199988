"""PB-LLM: against the paper's algorithm as a plain loop, and to the last byte."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq import PBLLM, LayerStats, PTQMethod, Statistic
from bitnet.ptq.hessian import relative_error


def layer(rows: int, columns: int) -> tuple[Tensor, LayerStats]:
    """Normal weights of uneven columns, one outlier, a zero row; correlated inputs, one of them dead."""
    weight = torch.randn(rows, columns) * torch.linspace(0.5, 2, columns)
    weight[rows // 2, columns // 3] = 15.0
    if rows > 2:
        weight[1] = 0.0
    x = torch.randn(500, columns) @ (torch.eye(columns) + 0.5 * torch.randn(columns, columns) / columns**0.5)
    x *= torch.linspace(0.3, 3, columns).flip(0)
    if columns > 3:
        x[:, 2] = 0.0
    return weight, LayerStats(n_tokens=500, hessian=x.t() @ x / 500)


def reference(weight: Tensor, upper: Tensor, share: float, saliency: str) -> Tensor:
    """Column by column, each error spread over all columns that follow."""
    weight = weight.clone()
    worth = weight.abs() if saliency == "magnitude" else (weight / upper.diagonal()) ** 2
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for place in worth.flatten().sort(descending=True, stable=True).indices[: round(share * weight.numel())].tolist():
        mask[place // weight.shape[1], place % weight.shape[1]] = True
    rest = [row[~kept].abs() for row, kept in zip(weight, mask, strict=True)]
    low = torch.tensor([float(row.mean()) if len(row) else 0.0 for row in rest])
    low, step = low.half().float(), (weight.abs().max(1).values / 127).half().float()
    out = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        for i in range(len(weight)):
            w = float(weight[i, j])
            if not mask[i, j]:
                out[i, j] = low[i] if w >= 0 else -low[i]
            elif step[i] > 0:
                out[i, j] = min(max(round(w / float(step[i])), -127), 127) * step[i]
        error = (weight[:, j] - out[:, j]) / upper[j, j]
        weight[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return out


@pytest.mark.parametrize("saliency", ["hessian", "magnitude"])
@pytest.mark.parametrize(("rows", "columns", "share"), [(12, 70, 0.1), (5, 33, 0.4), (3, 9, 0.0), (3, 9, 1.0)])
def test_it_is_the_published_algorithm(rows: int, columns: int, share: float, saliency: str) -> None:
    weight, stats = layer(rows, columns)
    assert stats.hessian is not None
    alive = weight.masked_fill(stats.hessian.diagonal() == 0, 0.0)
    result = PBLLM(share=share, saliency=saliency).quantize(weight, stats)
    expected = reference(alive, stats.inverse_factor(0.01).upper, share, saliency)
    torch.testing.assert_close(result.dequantize(), expected, rtol=1e-5, atol=1e-5)


def test_what_the_paper_counts_is_a_bit_short_of_what_is_stored() -> None:
    weight, stats = layer(128, 512)
    method = PBLLM(share=0.1)
    result = method.quantize(weight, stats)
    expected = {"signs": 0.9, "high": 0.8, "mask": 1.0, "low_scale": 16 / 512, "high_scale": 16 / 512}
    assert result.parts == pytest.approx(expected, abs=0.001)
    assert method.claimed_bits == pytest.approx(1.7)
    assert result.bits_per_weight == pytest.approx(method.claimed_bits + 1 + 32 / 512, abs=0.001)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(24, 150), (3, 5), (4, 1)])
def test_a_file_has_the_size_that_is_counted_and_gives_the_same_weights(
    share: float, rows: int, columns: int, tmp_path: Path
) -> None:
    weight, stats = layer(rows, columns)
    result = PBLLM(share=share).quantize(weight, stats)
    tensors = {f.name: getattr(result, f.name) for f in fields(result)}
    plain = {name: value for name, value in tensors.items() if not isinstance(value, Tensor)}
    save_file({name: value for name, value in tensors.items() if isinstance(value, Tensor)}, tmp_path / "w.safetensors")
    written = (tmp_path / "w.safetensors").read_bytes()
    header = 8 + int.from_bytes(written[:8], "little")
    assert (len(written) - header) * 8 == round(result.bits_per_weight * rows * columns)
    again = type(result)(**load_file(tmp_path / "w.safetensors"), **plain)
    assert torch.equal(again.dequantize(), result.dequantize())


def test_the_hessian_finds_better_weights_to_keep_than_their_magnitude() -> None:
    weight, stats = layer(64, 128)
    assert stats.hessian is not None
    errors = [
        relative_error(weight, PBLLM(saliency=each).quantize(weight, stats).dequantize(), stats.hessian)
        for each in ("hessian", "magnitude")
    ]
    assert errors[0] < errors[1]


def test_zero_rows_and_dead_columns_are_zero() -> None:
    weight, stats = layer(16, 40)
    values = PBLLM().quantize(weight, stats).dequantize()
    assert (values[1] == 0).all()
    assert torch.isfinite(values).all()


def test_it_asks_for_the_hessian() -> None:
    method: PTQMethod = PBLLM()
    assert method.requires == {Statistic.HESSIAN}


def test_weights_that_cannot_be_stored_are_refused() -> None:
    weight, stats = layer(16, 40)
    with pytest.raises(InputError, match=r"too large for scales in torch.float16"):
        PBLLM().quantize(weight * 1e8, stats)
    weight[3, 4] = torch.nan
    with pytest.raises(InputError, match="the weight holds NaN or infinity"):
        PBLLM().quantize(weight, stats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": -0.1}, "share must be between 0"),
        ({"share": 10}, "share must be between 0"),
        ({"saliency": "weights"}, "saliency must be one of hessian, magnitude"),
        ({"damping": 0}, "damping must be above 0"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PBLLM(**options)
