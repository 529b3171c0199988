"""What quantizing a tensor gives: integer codes, the scale that turns them back into values, and their cost in bits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bitnet.quant.grouping import per_column
from bitnet.quant.packing import packed_bits


@runtime_checkable
class QuantizedWeight(Protocol):
    """A weight matrix in fewer bits: `QTensor`, or a frozen dataclass of tensors and plain values that a method brings.

    Its fields are the arguments it is made from, so that modules, checkpoints and resuming can take it apart and put it
    together again.
    """

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        ...

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by weights: codes, scales, zero points, masks and indices all counted."""
        ...

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, shape [out, in]."""
        ...


@dataclass(frozen=True, slots=True)
class QTensor:
    """Integer codes on a uniform grid: ``x ~= (qdata - zero_point) * scale``.

    The shape of ``scale`` is the granularity: all ones for one scale a tensor, [*rows, 1] for one a row (an
    activation's row is its token), [*rows, groups] for one every ``group_size`` columns. The last group of a row may
    be narrower.

    Attributes:
        qdata: codes, int8, shape [*rows, cols].
        scale: multiplier, shape [*rows or 1, groups]: float32, or a 16-bit dtype in which it is stored and counted.
        levels: number of values a code can take: 2 (signs), 3 (ternary), 255 (absmax int8), 16 (4 bits) ...
        zero_point: the code that stands for 0.0, int8, in the shape of ``scale``; None where it is code 0. It is one of
            the codes (the range always includes 0.0), so it is stored in as many bits.
        group_size: columns that share a scale; None for the whole row.
        odd: the codes are the odd numbers from -(levels - 1) to levels - 1, so that ``scale`` is half a step: how four
            levels lie around 0.0 without one on it (-3, -1, +1, +3). Signs are odd by nature and need not say so.
    """

    qdata: Int8[Tensor, "*rows cols"]
    scale: Float[Tensor, "*scale_rows groups"]
    levels: int
    zero_point: Int8[Tensor, "*scale_rows groups"] | None = None
    group_size: int | None = None
    odd: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of ``qdata``."""
        return self.qdata.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of the codes, in the shape of ``qdata``: computed in float32 and rounded once to ``dtype``."""
        values = self.qdata.float()  # then in place: int8 * float32 would allocate twice, 1.7x slower for 18M weights
        if self.zero_point is not None:
            values -= self.per_column(self.zero_point)
        values *= self.per_column(self.scale.float())
        return values.to(dtype)

    def per_column(self, per_group: Tensor) -> Tensor:
        """Repeat a per-group tensor along the columns, so that it broadcasts against ``qdata``."""
        if self.group_size is None:
            return per_group
        return per_column(per_group, self.group_size, self.qdata.shape[-1])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight: codes and zero points in their densest packing (`packed_bits`), scales as they are."""
        bits = packed_bits(self.qdata.shape, self.levels) + self.scale.numel() * self.scale.element_size() * 8
        if self.zero_point is not None:
            bits += packed_bits(self.zero_point.shape, self.levels)
        return bits / self.qdata.numel()


Quantizer = Callable[[Tensor], QTensor]
"""A pure function from a float tensor to its codes. Options are bound with `functools.partial`."""
