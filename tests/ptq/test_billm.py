"""BiLLM in its published format: against the published algorithm, quirk by quirk, and to the last byte."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet.errors import InputError
from bitnet.nn import QuantizedLinear
from bitnet.ptq import LayerStats, PTQMethod, Statistic
from bitnet.ptq.billm import BiLLM, BlockBinary
from bitnet.ptq.billm.binary import STEPS, Rule, approximate, values
from bitnet.ptq.billm.published import compensation
from bitnet.ptq.hessian import relative_error

VARIANTS = ["ours", "official", "paper", "refined"]


def layer(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, LayerStats]:
    """Weights with normal tails, one outlier, a zero row; correlated inputs, one of them dead."""
    weight = torch.randn(rows, columns) * torch.linspace(0.5, 2, columns)
    weight[rows // 2, columns // 3] = 15.0
    if rows > 2:
        weight[1] = 0.0
    x = torch.randn(500, columns) @ (torch.eye(columns) + 0.5 * torch.randn(columns, columns) / columns**0.5)
    x = x * torch.linspace(0.3, 3, columns).flip(0)
    if columns > 3:
        x[:, 2] = 0.0
    return weight.to(dtype), LayerStats(n_tokens=500, hessian=x.t() @ x / 500)


def reference(weight: Tensor, upper: Tensor, size: int, searches_saliency: bool, third_level: bool = True) -> Tensor:
    """The published algorithm as a plain loop with NaN for what is outside of a group. Float32, nothing rounded.

    ``third_level``: the sign of 0 is 0, as in the code; else +1.
    """
    sign = torch.sign if third_level else (lambda t: torch.where(t >= 0, 1.0, -1.0))

    def once(t: Tensor, mask: Tensor) -> Tensor:
        inside = torch.where(mask, t, torch.nan)
        mean = inside.nanmean(1, keepdim=True).nan_to_num(0)
        scale = (inside - mean).abs().nanmean(1, keepdim=True).nan_to_num(0)
        return torch.where(mask, mean + scale * sign(t - mean), 0.0)

    def twice(t: Tensor, mask: Tensor) -> Tensor:
        return once(t, mask) + once(t - once(t, mask), mask)

    def groups(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ranked = x.abs().sum(0).argsort(descending=True, stable=True)
        errors = {}
        for count in range(1, min(49, x.shape[1] - 1) + 1):
            mask = torch.zeros_like(x, dtype=torch.bool)
            mask[:, ranked[:count]] = True
            errors[count] = float((x - twice(x, mask) - twice(x, ~mask)).square().sum())
        salient = torch.zeros_like(x, dtype=torch.bool)
        if errors:
            salient[:, ranked[: min(errors, key=lambda count: errors[count])]] = True
        magnitude = (x * ~salient).abs()
        best, found = float("inf"), salient
        for p in torch.quantile(magnitude, torch.linspace(0.1, 0.9, 81)):
            sparse, dense = (x.abs() > p) & ~salient, (x.abs() <= p) & ~salient
            error = float((x * ~salient - once(x, sparse) - once(x, dense)).square().sum())
            if error < best:
                best, found = error, sparse
        return found, ~found & ~salient, salient

    weight, out = weight.clone(), torch.zeros_like(weight)
    for begin in range(0, weight.shape[1], size):
        end = min(begin + size, weight.shape[1])
        own, diagonal = weight[:, begin:end], upper.diagonal()[begin:end]
        sparse, dense, salient = groups(own.square() / diagonal.square() if searches_saliency else own)
        out[:, begin:end] = once(own, sparse) + once(own, dense) + twice(own, salient)
        weight[:, end:] -= ((own - out[:, begin:end]) / diagonal) @ upper[begin:end, end:]
    return out


def paper_reference(weight: Tensor, upper: Tensor, size: int) -> Tensor:
    """The paper's algorithm 1 as a plain loop: no means, searches on the weights, the block's whole factor."""

    def once(t: Tensor, mask: Tensor) -> Tensor:
        scale = torch.where(mask, t.abs(), torch.nan).nanmean(1, keepdim=True).nan_to_num(0)
        return torch.where(mask, scale * torch.where(t >= 0, 1.0, -1.0), 0.0)

    def twice(t: Tensor, mask: Tensor) -> Tensor:
        return once(t, mask) + once(t - once(t, mask), mask)

    weight, out = weight.clone(), torch.zeros_like(weight)
    for begin in range(0, weight.shape[1], size):
        end = min(begin + size, weight.shape[1])
        own = weight[:, begin:end]
        ranked = own.abs().sum(0).argsort(descending=True, stable=True)
        masks = []
        for count in range(min(3, end - begin - 1), min(30, end - begin - 1) + 1):
            masks.append(torch.zeros_like(own, dtype=torch.bool))
            masks[-1][:, ranked[:count]] = True
        salient = min(masks, key=lambda mask: float((own - twice(own, mask) - once(own, ~mask)).square().sum()))
        largest, best = float(own[~salient].abs().max()), float("inf")
        for share in torch.linspace(0.1, 0.9, 81):
            sparse = (own.abs() > share * largest) & ~salient
            found = once(own, sparse) + once(own, ~sparse & ~salient)
            error = float((own * ~salient - found).square().sum())
            if error < best:
                best, out[:, begin:end] = error, found + twice(own, salient)
        spread = (own - out[:, begin:end]).double() @ upper[begin:end, begin:end].double().inverse()
        weight[:, end:] -= (spread @ upper[begin:end, end:].double()).float()
    return out


@pytest.mark.parametrize(("rows", "columns"), [(24, 150), (7, 65), (5, 4)])
def test_the_paper_variant_is_the_algorithm_of_the_paper(rows: int, columns: int) -> None:
    weight, stats = layer(rows, columns)
    assert stats.hessian is not None
    alive = weight.masked_fill(stats.hessian.diagonal() == 0, 0.0)
    expected = paper_reference(alive, stats.inverse_factor(0.01).upper, 64)
    result = BiLLM(variant="paper", block_size=64, quirks={"scale_dtype": "float32"}).quantize(weight, stats)
    torch.testing.assert_close(result.dequantize(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("search", ["saliency", "weights"])
@pytest.mark.parametrize(("rows", "columns"), [(24, 150), (7, 65)])
def test_the_official_variant_is_the_published_algorithm(rows: int, columns: int, search: str) -> None:
    weight, stats = layer(rows, columns)
    assert stats.hessian is not None
    method = BiLLM(variant="official", block_size=64, quirks={"search": search, "scale_dtype": "float32"})
    alive = weight.masked_fill(stats.hessian.diagonal() == 0, 0.0)
    expected = reference(alive, stats.inverse_factor(0.01).upper, 64, search == "saliency")
    torch.testing.assert_close(method.quantize(weight, stats).dequantize(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"search": "weights"},
        {"columns": (3, 30)},
        {"rest_order": 1},
        {"means": False},
        {"split": "fraction"},
        {"compensation": "block"},
        {"refits": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_quirk_of_the_published_code_changes_the_result(change: dict[str, Any]) -> None:
    weight, stats = layer(32, 128)
    official = BiLLM(variant="official", block_size=64).quantize(weight, stats).dequantize()
    other = BiLLM(variant="official", block_size=64, quirks=change).quantize(weight, stats).dequantize()
    assert not torch.equal(official, other)


def test_the_third_level_of_the_published_code_shows_in_weights_that_equal_their_mean() -> None:
    half = torch.randint(0, 3, (8, 20)).float()
    weight, stats = torch.cat([half, -half], 1), LayerStats(n_tokens=9, hessian=torch.eye(40))  # every mean is 0
    with_third = BiLLM(variant="official").quantize(weight, stats)
    two = BiLLM(variant="official", quirks={"third_level": False}).quantize(weight, stats)
    assert isinstance(with_third, BlockBinary)
    assert len(with_third.zeros) + len(with_third.zeros_second) > 0
    assert not torch.equal(with_third.dequantize(), two.dequantize())
    assert with_third.bits_per_weight > two.bits_per_weight  # where they are is stored, and counted


@pytest.mark.parametrize("search", ["saliency", "weights"])
def test_the_third_level_is_where_the_published_algorithm_has_it(search: str) -> None:
    half = torch.randint(0, 4, (8, 24)).float()
    weight = torch.cat([half, -half], 1)  # symmetric rows, so that means are 0 and zeros equal them
    stats = LayerStats(n_tokens=9, hessian=torch.eye(48))
    upper = stats.inverse_factor(0.01).upper
    quirks = {"search": search, "scale_dtype": "float32"}
    found = BiLLM(variant="official", quirks=quirks).quantize(weight, stats)
    assert isinstance(found, BlockBinary)
    expected = reference(weight, upper, 128, search == "saliency")
    assert torch.equal(found.dequantize() == 0, expected == 0)
    assert len(found.zeros) > 0
    torch.testing.assert_close(found.dequantize(), expected, rtol=1e-5, atol=1e-5)
    two = BiLLM(variant="official", quirks={**quirks, "third_level": False}).quantize(weight, stats)
    plain = reference(weight, upper, 128, search == "saliency", third_level=False)
    torch.testing.assert_close(two.dequantize(), plain, rtol=1e-5, atol=1e-5)
    assert not torch.equal(expected, plain)


@pytest.mark.parametrize(("kind", "exact"), [("block", True), ("diagonal", False)])
def test_the_block_compensation_is_the_least_squares_optimum_and_the_diagonal_is_not(kind: str, exact: bool) -> None:
    _, stats = layer(16, 96)
    upper = stats.inverse_factor(0.01).upper
    hessian = torch.linalg.inv(upper.double().t() @ upper.double())
    difference = torch.randn(16, 48)
    best = -difference.double() @ hessian[:48, 48:] @ torch.linalg.inv(hessian[48:, 48:])  # dE/dD_2 = 0
    taken = compensation(difference, upper[:48, :48], upper[:48, 48:], kind).double()
    assert (float((taken - best).norm() / best.norm()) < 1e-4) == exact


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_no_step_of_the_refits_makes_the_error_of_any_row_larger(order: int, dtype: torch.dtype | None) -> None:
    t = torch.randn(40, 60) ** 3
    t[3] = 0.0
    t[5, 5] = 1000.0
    members = torch.rand(40, 60) < 0.6
    rule = Rule(dtype=dtype)
    terms = approximate(t, members, order, rule)

    def error() -> Tensor:
        return ((t - values(terms)) * members).square().sum(1)

    first = before = error()
    for _ in range(5):
        for k in range(order):
            for step in STEPS:
                terms[k] = step(t - values(terms) + terms[k].values, terms[k], rule)
                assert (error() <= before * (1 + 1e-5) + 1e-6).all()
                before = error()
    assert before.sum() < first.sum()


def test_refined_beats_the_published_code_in_the_same_bytes() -> None:
    weight, stats = layer(64, 256)
    assert stats.hessian is not None
    results = [BiLLM(variant=name).quantize(weight, stats) for name in ("official", "refined")]
    errors = [relative_error(weight, result.dequantize(), stats.hessian) for result in results]
    assert errors[1] < 0.8 * errors[0]
    assert results[1].bits_per_weight <= results[0].bits_per_weight


def test_the_published_format_takes_three_bits_a_weight() -> None:
    weight = torch.randn(64, 256)
    result = BiLLM(variant="official").quantize(weight, LayerStats(n_tokens=1, hessian=torch.eye(256)))
    assert isinstance(result, BlockBinary)
    parts = result.parts
    share = result.claimed_bits - 1
    assert 0 < share < 0.4
    assert parts["residual"] == pytest.approx(share, abs=0.001)
    assert parts["bitmap"] == pytest.approx(1 - share, abs=0.001)
    assert parts["signs"] + parts["residual"] + parts["bitmap"] == pytest.approx(2, abs=0.002)
    assert parts["scale"] + parts["mean"] == 1.0
    assert result.bits_per_weight == pytest.approx(3 + 1 / 64, abs=0.002)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rows", "columns"), [(24, 150), (128, 256), (3, 5)])
def test_a_file_has_the_size_that_is_counted_and_gives_the_same_weights(
    variant: str, rows: int, columns: int, tmp_path: Path
) -> None:
    weight, stats = layer(rows, columns)
    result = BiLLM(variant=variant, bits=1.5).quantize(weight, stats)
    tensors = {f.name: getattr(result, f.name) for f in fields(result)}
    plain = {name: value for name, value in tensors.items() if not isinstance(value, Tensor)}
    tensors = {name: value.contiguous() for name, value in tensors.items() if isinstance(value, Tensor)}
    save_file(tensors, tmp_path / "weight.safetensors")
    written = (tmp_path / "weight.safetensors").read_bytes()
    header = 8 + int.from_bytes(written[:8], "little")
    assert (len(written) - header) * 8 == round(result.bits_per_weight * rows * columns)
    again = type(result)(**load_file(tmp_path / "weight.safetensors"), **plain)
    assert torch.equal(again.dequantize(), result.dequantize())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 1), (1, 40), (6, 3), (9, 129), (8, 100), (256, 30)])
def test_any_shape_is_quantized(variant: str, rows: int, columns: int) -> None:
    weight, stats = layer(rows, columns)
    assert stats.hessian is not None
    result = BiLLM(variant=variant, block_size=64).quantize(weight, stats)
    assert result.shape == weight.shape
    assert torch.isfinite(result.dequantize()).all()
    assert relative_error(weight, result.dequantize(), stats.hessian) < 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_weights_stay_zero(variant: str) -> None:
    result = BiLLM(variant=variant, block_size=8).quantize(torch.zeros(6, 20), layer(6, 20)[1])
    assert torch.equal(result.dequantize(), torch.zeros(6, 20))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_zero_row_stays_zero_and_a_dead_column_is_zero(variant: str) -> None:
    weight, stats = layer(16, 40)
    values = BiLLM(variant=variant, block_size=16, bits=2).quantize(weight, stats).dequantize()
    assert (values[1] == 0).all() or variant != "ours"
    assert values[1].abs().max() < 1e-6
    assert values[:, 2].abs().max() <= values.abs().mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_result_depends_on_the_weight_alone_and_changes_no_argument(variant: str) -> None:
    weight, stats = layer(16, 40, torch.bfloat16)
    assert stats.hessian is not None
    kept, hessian = weight.clone(), stats.hessian.clone()
    method = BiLLM(variant=variant, block_size=16, quirks={} if variant == "ours" else {"refits": 2})
    first = method.quantize(weight, stats)
    second = method.quantize(weight.float(), LayerStats(n_tokens=1, hessian=hessian.clone()))
    for f in fields(first):
        one, other = getattr(first, f.name), getattr(second, f.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert torch.equal(weight, kept)
    assert torch.equal(stats.hessian, hessian)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_live_in_a_layer(variant: str) -> None:
    weight, stats = layer(16, 40)
    result = BiLLM(variant=variant, block_size=16).quantize(weight, stats)
    x = torch.randn(3, 40)
    torch.testing.assert_close(QuantizedLinear(result)(x), x @ result.dequantize().t())
    assert torch.equal(result.dequantize(torch.bfloat16), result.dequantize().bfloat16())


class HostReads(TorchDispatchMode):
    """Counts how often a number goes from a tensor to Python: on a GPU, each is a wait for all work before it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_reads(method: BiLLM, columns: int) -> int:
    weight, stats = layer(16, columns)
    stats.inverse_factor(method.damping, key="")
    with HostReads() as reads:
        method.quantize(weight, stats)
    return reads.count


def test_no_step_of_a_search_waits_for_the_host() -> None:
    steps = [{"columns": (1, most)} for most in (3, 49)]
    few, many = (host_reads(BiLLM(variant="official", quirks=each), 128) for each in steps)
    assert few == many
    assert host_reads(BiLLM(variant="official"), 256) - many <= 5  # a second block: two choices, and what torch asks
    assert host_reads(BiLLM(), 256) == host_reads(BiLLM(sweeps=1), 64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_that_are_not_finite_are_refused(variant: str) -> None:
    for bad in (float("nan"), float("inf")):
        weight, stats = layer(16, 40)
        weight[3, 4] = bad
        with pytest.raises(InputError, match="the weight holds NaN or infinity"):
            BiLLM(variant=variant).quantize(weight, stats)


@pytest.mark.parametrize("variant", ["official", "paper", "refined"])
def test_weights_that_are_too_large_for_the_scales_are_refused(variant: str) -> None:
    weight, stats = layer(16, 40)
    with pytest.raises(InputError, match=r"too large for scales in torch.float16.*: set quirks.scale_dtype"):
        BiLLM(variant=variant).quantize(weight * 1e6, stats)
    wide = BiLLM(variant=variant, quirks={"scale_dtype": "float32"}).quantize(weight * 1e6, stats)
    assert torch.isfinite(wide.dequantize()).all()


def test_what_a_method_asks_for_depends_on_its_options() -> None:
    method: PTQMethod = BiLLM()
    assert BiLLM().variant == "ours"
    assert method.requires == {Statistic.HESSIAN}
    assert BiLLM(correction=0.5).requires == {Statistic.HESSIAN, Statistic.CROSS}
    assert BiLLM(bits=1.5).claimed_bits == 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "theirs"}, "variant must be one of ours, paper, official, refined"),
        ({"bits": 0.5}, "bits must be 1 to 5"),
        ({"damping": 0}, "damping must be above 0"),
        ({"correction": 2}, "correction must be between 0"),
        ({"sweeps": -1}, "sweeps must be 0 or more"),
        ({"block_size": 0}, "block_size 1 or more"),
        ({"quirks": {"means": False}}, "quirks belong to the published format"),
        ({"variant": "paper", "quirks": {"mean": False}}, "quirks has no mean: it has"),
        ({"variant": "paper", "quirks": {"search": "w"}}, "quirks.search must be one of saliency, weights"),
        ({"variant": "paper", "quirks": {"columns": (5, 3)}}, "quirks.columns must be"),
        ({"variant": "paper", "quirks": {"refits": -1}}, "quirks.refits must be 0 or more"),
        ({"variant": "paper", "quirks": {"scale_dtype": "int8"}}, "quirks.scale_dtype must be one of"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BiLLM(**options)
