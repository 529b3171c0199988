"""What calibration collects of a layer's inputs, batch by batch.

Sums in float32 and a count: two collections add up to that of both texts, so processes that saw different shares of the
text reduce theirs to one.
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq.protocol import LayerStats, Statistic
from bitnet.quant import Quantizer
from bitnet.quant.histogram import Histogram
from bitnet.quant.static import StaticActivation

Activation = Quantizer | StaticActivation | None
"""What quantizes a layer's inputs: dynamic, still to be calibrated, or nothing."""


class InputStatistics:
    """Sums over the inputs x [*tokens, in] of one layer, or of several that read the same.

    Args:
        wanted: what to collect.
        columns: in.
        device: where to keep the sums.
    """

    def __init__(self, wanted: Iterable[Statistic], columns: int, device: torch.device | str = "cpu") -> None:
        self.n_tokens = 0
        shapes = {Statistic.HESSIAN: (columns, columns), Statistic.CROSS: (columns, columns)}
        self._sums = {each: torch.zeros(shapes.get(each, (columns,)), device=device) for each in sorted(wanted)}

    def update(self, x: Float[Tensor, "*tokens in"], full_precision: Float[Tensor, "*tokens in"] | None = None) -> None:
        """Add the inputs of one batch; ``full_precision`` is what the full-precision model has in the place of x."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.n_tokens += len(x)
        for statistic, total in self._sums.items():
            match statistic:
                case Statistic.HESSIAN:
                    total.addmm_(x.t(), x)
                case Statistic.CROSS:
                    if full_precision is None or full_precision.numel() != x.numel():
                        raise InputError(
                            "the full-precision model does not send the same tokens to this layer (experts are chosen "
                            "anew): set correction=0"
                        )
                    total.addmm_((x - full_precision.detach().reshape(x.shape).float()).t(), x)
                case Statistic.MEAN_SQUARE:
                    total.add_(x.square().sum(0))
                case Statistic.ABSMAX:
                    torch.maximum(total, x.abs().amax(0), out=total)

    def merge(self, other: "InputStatistics") -> "InputStatistics":
        """The statistics of both texts."""
        merged = InputStatistics((), 0)
        merged.n_tokens = self.n_tokens + other.n_tokens
        for statistic, total in self._sums.items():
            join = torch.maximum if statistic is Statistic.ABSMAX else torch.add
            merged._sums[statistic] = join(total, other._sums[statistic])
        return merged

    def all_reduce(self) -> None:
        """Merge with the other processes' statistics, in place; alone, it does nothing."""
        if not in_parallel():
            return
        count = torch.tensor(self.n_tokens, device=next(iter(self._sums.values())).device if self._sums else None)
        torch.distributed.all_reduce(count)
        self.n_tokens = int(count)
        operations = torch.distributed.ReduceOp
        for statistic, total in self._sums.items():
            operation = operations.MAX if statistic is Statistic.ABSMAX else operations.SUM
            torch.distributed.all_reduce(total, op=operation)

    def finish(self, name: str) -> LayerStats:
        """The means; the sums are used up.

        Raises:
            InputError: no input reached the layer called ``name``, or one was NaN or infinite.
        """
        if not self.n_tokens:
            raise InputError(
                f"no calibration token reaches {name}: give more text (calibration.windows), or leave the layer out "
                "(driver.exclude)"
            )
        for statistic, total in self._sums.items():
            if not bool(torch.isfinite(total).all()):
                raise InputError(f"the inputs of {name} hold NaN or infinity: the model or an earlier layer is damaged")
            if statistic is not Statistic.ABSMAX:
                total.div_(self.n_tokens)
        means: dict[str, Any] = {each.value: total for each, total in self._sums.items()}
        return LayerStats(n_tokens=self.n_tokens, **means)


class StageInputs:
    """The inputs that the layers of one stage share: what is collected of them, and what is made of it.

    Args:
        wanted: statistics to collect.
        columns: in.
        activation: what is to quantize the inputs; a `StaticActivation` gets a histogram of them.
        device: where to keep the sums.

    Attributes:
        stats: once `finish` was called, where anything was collected.
    """

    def __init__(
        self, wanted: set[Statistic], columns: int, activation: Activation | None, device: torch.device
    ) -> None:
        self.stats: LayerStats | None = None
        self._sums = InputStatistics(wanted, columns, device)
        self._activation = activation
        self._histogram = Histogram() if isinstance(activation, StaticActivation) else None
        self.wants_anything = bool(wanted) or self._histogram is not None

    def update(self, x: Tensor, full_precision: Tensor | None) -> None:
        """Add the inputs of one batch; see `InputStatistics.update`."""
        self._sums.update(x, full_precision)
        if self._histogram is not None:
            self._histogram.update(x)

    def finish(self, name: str) -> None:
        """Merge with other processes and make ``stats``; ``name`` is for the errors of `InputStatistics.finish`."""
        self._sums.all_reduce()
        self.stats = self._sums.finish(name)
        if self._histogram is not None and in_parallel():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self._histogram)
            self._histogram = reduce(Histogram.merge, parts)

    def quantizer(self) -> Quantizer | None:
        """What quantizes the inputs of one layer."""
        if isinstance(self._activation, StaticActivation):
            assert self._histogram is not None
            return self._activation.calibrated(self._histogram)
        return self._activation


def in_parallel() -> bool:
    """Whether this is one of several processes that share the calibration text."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
