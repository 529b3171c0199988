"""Which part of the values' range a uniform grid covers: (low, high), always around 0.0.

A wide range represents every value and rounds all of them coarsely; a narrow one clips the few largest and rounds the
rest finely. Each rule reads a `Sample`: sets of values with how often each occurred. Weights are such a sample (every
value once, one set for each scale), and so are the bins of a histogram of activations, so there is one implementation.

Rules that compare ranges price them on the grid that is deployed: with the scale rounded to its stored dtype, and the
zero point to a code. The full range is always among those compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant.histogram import Histogram
from bitnet.quant.rounding import stored

SHARES = 100  # ranges that `least_error` compares: 1 % to 100 % of the full one
FINER = (0.75, 0.5, 0.25, -0.25, -0.5, -0.75)  # and then these many percent more
CHUNK = 2**17  # values priced at a time: they stay in the cache, and memory does not grow with the matrix
SMOOTHING = 1e-4  # share of the mass that is spread evenly before distributions are compared


@dataclass(frozen=True, slots=True)
class Codes:
    """Consecutive integer codes, and how the scale that turns them into values is stored.

    Attributes:
        levels: how many codes.
        symmetric: 0.0 is code 0, without a zero point; else one of the codes is the zero point.
        scale_dtype: what the scale is rounded to.
    """

    levels: int
    symmetric: bool
    scale_dtype: torch.dtype = torch.float32

    @property
    def low(self) -> int:
        """The smallest code."""
        return -(self.levels // 2)

    @property
    def high(self) -> int:
        """The largest code."""
        return self.low + self.levels - 1

    def parameters(
        self, low: Float[Tensor, "*sets"], high: Float[Tensor, "*sets"]
    ) -> tuple[Float[Tensor, "*sets"], Int8[Tensor, "*sets"] | None]:
        """Scale and zero point of the grid over [low, high]; ``low <= 0 <= high``.

        A range below 1e-5 is widened to it, and a scale below the smallest number of its dtype raised to that.
        """
        span = (high.float() - low.float()).clamp(min=1e-5)
        dtype = self.scale_dtype
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        scale = stored(span / torch.full_like(span, self.levels - 1), dtype).clamp(min=smallest)
        if self.symmetric:
            return scale, None
        zero = ((-low.float() / scale.float()).round() + self.low).clamp(self.low, self.high)
        return scale, zero.to(torch.int8)


@dataclass(frozen=True, slots=True)
class Sample:
    """Sets of values (the last dimension), each with how often it occurred.

    Attributes:
        values: float32 or float64, in any order: the values, or the centres of bins.
        low, high: the exact ends of each set, widened to include 0.0.
        counts: how often; 0 leaves a value out; None: each once.
        importance: weight of a value's error where ranges are compared by their errors; None: all equal.
        width: of a bin; 0 where the values are exact.
    """

    values: Float[Tensor, "*sets n"]
    low: Float[Tensor, "*sets"]
    high: Float[Tensor, "*sets"]
    counts: Float[Tensor, "*#sets n"] | None = None
    importance: Float[Tensor, "*#sets n"] | None = None
    width: float = 0.0

    @classmethod
    def of_values(
        cls, values: Float[Tensor, "*sets n"], counts: Tensor | None = None, importance: Tensor | None = None
    ) -> "Sample":
        """Every value by itself. Values that ``counts`` leaves out must be 0.0."""
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        return cls(values, low, high, counts, importance)

    @classmethod
    def of_histogram(cls, histogram: Histogram) -> "Sample":
        """One set: the bins of ``histogram``.

        Raises:
            InputError: it has seen nothing.
        """
        if histogram.count == 0:
            raise InputError("a range needs values, got an empty histogram: calibrate on some text first")
        low = torch.tensor(min(histogram.minimum, 0.0), dtype=torch.float64)
        high = torch.tensor(max(histogram.maximum, 0.0), dtype=torch.float64)
        return cls(histogram.centres, low, high, histogram.counts.double(), width=histogram.width)


RangeRule = Callable[[Sample, Codes], tuple[Tensor, Tensor]]
"""The range of each set: low and high [*sets]."""


def min_max(sample: Sample, codes: Codes) -> tuple[Float[Tensor, "*sets"], Float[Tensor, "*sets"]]:
    """Every value: the minimum and the maximum (symmetric: -max|x| and max|x|), with 0.0 between."""
    if codes.symmetric:
        high = torch.maximum(-sample.low, sample.high)
        return -high, high
    return sample.low, sample.high


def percentile(
    sample: Sample, codes: Codes, *, percent: float | int = 99.9
) -> tuple[Float[Tensor, "*sets"], Float[Tensor, "*sets"]]:
    """The smallest range that ``percent`` % of the values lie in, ends included; 0.0 always does.

    Symmetric: the smallest t with that share of |x| <= t. Else half of the rest may lie above and half below. A set of
    n values loses none of them until ``percent`` is below ``100 (1 - 1/n)`` (asymmetric: ``100 (1 - 2/n)``). Of bins
    the outer edge counts, within the exact minimum and maximum.
    """
    full_low, full_high = min_max(sample, codes)
    if codes.symmetric:
        high = _quantile(sample.values.abs(), sample.counts, percent) + sample.width / 2
        high = torch.minimum(high, full_high)
        return -high, high
    one_side = (100 + percent) / 2
    high = _quantile(sample.values, sample.counts, one_side) + sample.width / 2
    low = -_quantile(-sample.values, sample.counts, one_side) - sample.width / 2
    return torch.maximum(low.clamp(max=0), full_low), torch.minimum(high.clamp(min=0), full_high)


def _quantile(values: Tensor, counts: Tensor | None, percent: float | int) -> Tensor:
    """The smallest value with ``percent`` % of the counts at or below it."""
    ordered, order = values.sort(-1)
    occurrences = torch.ones_like(values) if counts is None else counts.expand_as(values)
    mass = occurrences.double().gather(-1, order).cumsum(-1)
    wanted = mass[..., -1:] * percent / 100 * (1 - 1e-12)  # 99.9 % of 1000 are 999, whatever the product rounds to
    first = (mass < wanted).sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)
    return ordered.gather(-1, first).squeeze(-1)


def mean_magnitude(sample: Sample, codes: Codes) -> tuple[Float[Tensor, "*sets"], Float[Tensor, "*sets"]]:
    """-mean|x| to mean|x|: BitNet b1.58's range for the three levels of a ternary grid.

    Raises:
        InputError: another number of levels, for which it would clip most values.
    """
    if codes.levels != 3:
        raise InputError(
            f"range absmean is for ternary weights (3 levels), got {codes.levels} levels: use mse or minmax"
        )
    counted = sample.values if sample.counts is None else sample.values * sample.counts
    members = torch.full_like(counted, 1) if sample.counts is None else sample.counts.expand_as(counted)
    # as `bitnet.quant.statistics` adds, so that weights a group get the very scales of `absmean_ternary`
    sums = torch.linalg.vector_norm(counted, 1, dim=-1).double()
    high = (sums / members.sum(-1, dtype=torch.float64).clamp(min=1)).to(counted.dtype)
    return -high, high


def least_error(
    sample: Sample, codes: Codes, *, norm: float | int = 2.0
) -> tuple[Float[Tensor, "*sets"], Float[Tensor, "*sets"]]:
    """The range with the smallest sum of ``importance * |x - quantized x|^norm``; of equal ones the widest.

    Both ends of the full range shrink by one factor: 1.00, 0.99 ... 0.01, and then the best of these by up to 0.0075.
    """
    low, high = min_max(sample, codes)
    sets, n = low.shape, sample.values.shape[-1]
    values = sample.values.reshape(-1, n)
    weights = _weights(sample)
    if weights is not None:
        weights = weights.expand_as(sample.values).reshape(-1, n)
    share = torch.empty(len(values), dtype=values.dtype, device=values.device)
    low, high = low.reshape(-1), high.reshape(-1)
    for rows in _chunks(len(values), max(CHUNK // n, 1)):
        part = None if weights is None else weights[rows]
        share[rows] = _best_share(values[rows], part, low[rows], high[rows], codes, norm)
    return (low * share).reshape(sets), (high * share).reshape(sets)


def _best_share(
    values: Tensor, weights: Tensor | None, low: Tensor, high: Tensor, codes: Codes, norm: float | int
) -> Tensor:
    best = torch.ones_like(low)
    least = _error(values, weights, low, high, codes, norm)

    def race(share: Tensor) -> None:
        nonlocal best, least
        error = _error(values, weights, low * share, high * share, codes, norm)
        better = error < least
        best, least = torch.where(better, share, best), torch.where(better, error, least)

    for percent in range(SHARES - 1, 0, -1):
        race(torch.full_like(low, percent / SHARES))
    coarse = best
    for finer in FINER:
        race((coarse + finer / SHARES).clamp(max=1.0))
    return best


def _error(
    values: Tensor, weights: Tensor | None, low: Tensor, high: Tensor, codes: Codes, norm: float | int
) -> Tensor:
    """Weighted sum of |error|^norm of each row [sets] on the grid over [low, high]."""
    scale, zero = codes.parameters(low, high)
    scale = scale.to(values.dtype)[:, None]
    shift = 0 if zero is None else zero[:, None].to(values.dtype)
    bottom = torch.zeros_like(scale) + (codes.low - shift)
    top = bottom + (codes.levels - 1)
    total = torch.zeros_like(low)
    for columns in _chunks(values.shape[1], CHUNK):
        steps = values[:, columns] / scale
        error = steps.round()
        torch.maximum(error, bottom, out=error)  # not clamp: with tensors as its ends torch 2.13 takes 15x as long
        torch.minimum(error, top, out=error).sub_(steps)
        error = error.square_() if norm == 2 else error.abs_().pow_(norm)
        if weights is not None:
            error *= weights[:, columns]
        total += error.sum(-1)
    return total * scale[:, 0] ** norm


def least_divergence(sample: Sample, codes: Codes) -> tuple[Float[Tensor, "*sets"], Float[Tensor, "*sets"]]:
    """The range whose codes keep the distribution best: the least KL(P || Q) of one set's histogram.

    For every bin edge t, from as many bins as there are positive codes: P is the histogram inside [-t, t] with all that
    is clipped added to its outermost bins; Q is what codes leave of it: the mass of each code spread evenly over those
    of its bins that are not empty. Both get a share of 1e-4 of even mass, so that no zero is compared. Asymmetric grids
    cover the part of [-t, t] between minimum and maximum. Source: Migacz, 8-bit inference with TensorRT, GTC 2017.

    Raises:
        InputError: several sets of values: a histogram of the few that share a scale says nothing.
    """
    if sample.low.numel() != 1:
        raise InputError("range entropy reads one distribution: set granularity to tensor, or choose range mse")
    shape = sample.low.shape
    if sample.width == 0:
        sample = _binned(sample)
    low, high = min_max(sample, codes)
    full = max(float(-low), float(high))
    if full == 0:
        return low.reshape(shape), high.reshape(shape)
    n_edges = max(round(full / sample.width + 0.5), 1)
    edges = sample.width * torch.arange(min(max(codes.levels // 2, 1), n_edges), n_edges, dtype=torch.float64)
    edges = torch.cat([edges, torch.tensor([full], dtype=torch.float64)]).flip(0)  # of equal ones the widest wins
    lows, highs = torch.maximum(low, -edges), torch.minimum(high, edges)
    step = max(2**18 // sample.values.shape[-1], 1)
    divergences = [_divergence(sample, codes, lows[part], highs[part]) for part in _chunks(len(edges), step)]
    best = int(torch.cat(divergences).argmin())
    return lows[best].reshape(shape), highs[best].reshape(shape)


def _divergence(sample: Sample, codes: Codes, low: Tensor, high: Tensor) -> Tensor:
    """KL(P || Q) of each candidate range [candidates]."""
    assert sample.counts is not None
    scale, zero = codes.parameters(low, high)
    half, centres = sample.width / 2, sample.values
    inside = (centres + half > low[:, None]) & (centres - half < high[:, None])
    counts = sample.counts * inside
    p = counts.clone()
    first = inside.to(torch.int8).argmax(-1, keepdim=True)
    last = first + inside.sum(-1, keepdim=True) - 1
    total = sample.counts.cumsum(-1).expand_as(p)
    p.scatter_add_(-1, first, total.gather(-1, first) - sample.counts[first])
    p.scatter_add_(-1, last, total[:, -1:] - total.gather(-1, last))
    shift = 0 if zero is None else zero[:, None].double()
    code = ((centres / scale[:, None].double()).round() + shift).clamp(codes.low, codes.high).long() - codes.low
    occupied = (counts > 0).double()
    empty = torch.zeros(len(p), codes.levels, dtype=p.dtype)
    mass, bins = empty.scatter_add(-1, code, counts), empty.scatter_add(-1, code, occupied)
    q = (mass / bins.clamp(min=1)).gather(-1, code) * occupied
    even = SMOOTHING * inside / inside.sum(-1, keepdim=True)
    p = (1 - SMOOTHING) * p / p.sum(-1, keepdim=True) + even
    q = (1 - SMOOTHING) * q / q.sum(-1, keepdim=True).clamp(min=1) + even
    return torch.where(inside, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0).sum(-1)


def _binned(sample: Sample) -> Sample:
    """The histogram of a sample of one set."""
    histogram = Histogram()
    values = sample.values.flatten()
    histogram.update(values if sample.counts is None else values[sample.counts.expand_as(sample.values).flatten() > 0])
    return Sample.of_histogram(histogram)


def _weights(sample: Sample) -> Tensor | None:
    if sample.counts is None or sample.importance is None:
        return sample.counts if sample.importance is None else sample.importance
    return sample.counts * sample.importance


def _chunks(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))


def range_rule(name: str, *, percent: float | int = 99.9, norm: float | int = 2.0) -> RangeRule:
    """The rule of that name, with the options that it has.

    Raises:
        InputError: there is none, ``percent`` outside (0, 100], or ``norm`` not above 0.
    """
    if not 0 < percent <= 100:
        raise InputError(f"percentile must be above 0 and at most 100, got {percent}")
    if not 0 < norm < float("inf"):
        raise InputError(f"norm (the exponent of the error) must be above 0 and finite, got {norm}")
    rules: dict[str, RangeRule] = {
        "minmax": min_max,
        "percentile": partial(percentile, percent=percent),
        "mse": partial(least_error, norm=norm),
        "entropy": least_divergence,
        "absmean": mean_magnitude,
    }
    if name not in rules:
        raise InputError(f"range must be one of {', '.join(rules)}, got {name!r}")
    return rules[name]
