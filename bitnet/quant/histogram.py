"""A histogram that any number of processes can fill in any order, and that never has to read its data twice.

Its range is -R to R with R a power of two just above the largest magnitude seen, 2048 bins on either side of zero. When
a larger value comes, R doubles and bins merge in pairs. All edges are dyadic and the bins of one range nest in those of
the next, so a value ends in the same bin whenever and wherever it was counted: the result depends on the values alone.

A bin holds ``[k, k+1) * width`` above zero and its mirror image below; 0.0 counts as positive.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError

BINS_PER_SIDE = 2048
SMALLEST_EXPONENT = -100  # R of zeros and of values below 2^-100: scaling to bins must not overflow float32


class Histogram:
    """Counts of the values seen so far, with their exact minimum and maximum.

    Attributes:
        counts: int64 [4096], from the bin next to -R to the one next to R.
        exponent: R is ``2^exponent``.
        minimum, maximum: exact, as float32 holds them; infinity and -infinity before the first value.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * BINS_PER_SIDE, dtype=torch.int64)
        self.exponent = SMALLEST_EXPONENT
        self.minimum, self.maximum = math.inf, -math.inf

    @property
    def count(self) -> int:
        """How many values were seen."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0**self.exponent / BINS_PER_SIDE

    @property
    def centres(self) -> Float[Tensor, " bins"]:
        """The middle of each bin, float64, ascending."""
        return (torch.arange(2 * BINS_PER_SIDE, dtype=torch.float64) - BINS_PER_SIDE + 0.5) * self.width

    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Count every value of ``x``, as float32. Works where ``x`` is; the counts stay on the CPU.

        Raises:
            InputError: ``x`` holds NaN or infinity; nothing of it is counted then.
        """
        if x.numel() == 0:
            return
        values = x.detach().float().flatten()
        low, high = (float(end) for end in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                f"a histogram counts finite values, got {_odd_ones(values)} of {values.numel()}: "
                "check the model and the text that it is calibrated on"
            )
        largest = max(-low, high)
        self._widen(math.frexp(largest)[1] if largest else SMALLEST_EXPONENT)
        for part in values.split(1 << 22):
            inside = (part.abs() * (1 / self.width)).to(torch.int64)  # exact: the width is a power of two
            bins = torch.where(part < 0, BINS_PER_SIDE - 1 - inside, BINS_PER_SIDE + inside)
            self.counts += torch.bincount(bins, minlength=2 * BINS_PER_SIDE).cpu()
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)

    def merge(self, other: "Histogram") -> "Histogram":
        """One histogram of all that both have seen; neither changes. Associative and commutative."""
        merged = Histogram()
        merged.exponent = max(self.exponent, other.exponent)
        for part in (self, other):
            merged.counts += _coarser(part.counts, merged.exponent - part.exponent)
        merged.minimum = min(self.minimum, other.minimum)
        merged.maximum = max(self.maximum, other.maximum)
        return merged

    def _widen(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = _coarser(self.counts, exponent - self.exponent)
            self.exponent = exponent


def _coarser(counts: Tensor, doublings: int) -> Tensor:
    """The same counts over a range that is 2^doublings as wide."""
    inside = torch.arange(BINS_PER_SIDE) >> min(doublings, 62)
    bins = torch.cat([BINS_PER_SIDE - 1 - inside.flip(0), BINS_PER_SIDE + inside])
    return torch.zeros_like(counts).index_add_(0, bins, counts)


def _odd_ones(values: Tensor) -> str:
    found = {"NaN": int(values.isnan().sum()), "infinity": int(values.isinf().sum())}
    return " and ".join(f"{name} {times} times" for name, times in found.items() if times)
