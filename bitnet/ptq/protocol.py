"""What a post-training method asks for, gets and gives.

A method is a pure function of one weight matrix and the statistics of its inputs. It never sees the model: the driver
(`bitnet.ptq.quantize`) collects what ``requires`` names, block by block, and puts the result in the model.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from bitnet.ptq.hessian import InverseFactor, inverse_factor
from bitnet.quant import QuantizedWeight


class Statistic(StrEnum):
    """What the driver can collect of a layer's inputs x [tokens, in]."""

    HESSIAN = "hessian"  # mean of x x^T
    CROSS = "cross"  # mean of (x - x_fp) x^T, x_fp the input that the full-precision model has there
    MEAN_SQUARE = "mean_square"  # mean of x^2: the diagonal of the Hessian, without the rest
    ABSMAX = "absmax"  # largest |x|


@dataclass(kw_only=True)
class LayerStats:
    """Statistics of the inputs that a layer was calibrated on; None what nobody asked for.

    Layers that read the same input share one object, and what is derived from it (`inverse_factor`) is computed once.

    Attributes:
        n_tokens: how many inputs were seen.
        hessian: float32 [in, in], the mean of x x^T.
        cross: float32 [in, in], the mean of (x - x_fp) x^T.
        mean_square: float32 [in], the mean of x^2.
        absmax: float32 [in], the largest |x|.
        damping: the largest share of the mean diagonal that a factorization of this Hessian needed; None before one.
    """

    n_tokens: int
    hessian: Float[Tensor, "in in"] | None = None
    cross: Float[Tensor, "in in"] | None = None
    mean_square: Float[Tensor, " in"] | None = None
    absmax: Float[Tensor, " in"] | None = None
    damping: float | None = None
    _factors: dict[tuple[float, str], InverseFactor] = field(default_factory=dict, repr=False)

    def inverse_factor(self, damping: float, order: Tensor | None = None, *, key: str = "") -> InverseFactor:
        """`bitnet.ptq.hessian.inverse_factor` of this Hessian, kept for the next layer with the same inputs.

        ``key`` names the order of the columns: two orders of one key must be equal.
        """
        assert self.hessian is not None, "a method that needs the Hessian has to require it"
        if (damping, key) not in self._factors:
            self._factors.clear()  # one at a time: it is as large as the Hessian
            self._factors[damping, key] = inverse_factor(self.hessian, damping, order)
            self.damping = max(self.damping or 0.0, self._factors[damping, key].damping)
        return self._factors[damping, key]


class PTQMethod(Protocol):
    """One post-training method with its options."""

    @property
    def requires(self) -> frozenset[Statistic]:
        """The statistics that `quantize` reads; empty for a method that needs no calibration text."""
        ...

    @property
    def claimed_bits(self) -> float:
        """The bits a weight that the method goes by; `QuantizedWeight.bits_per_weight` counts what is stored."""
        ...

    def quantize(self, weight: Float[Tensor, "out in"], stats: LayerStats | None) -> QuantizedWeight:
        """Quantize one matrix. ``stats`` is None where the method requires nothing.

        Raises:
            InputError: the matrix or its statistics cannot be used.
        """
        ...
