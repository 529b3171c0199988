"""k-quants: the block formats of llama.cpp's files, with a search for the scales and error feedback on their grids.

Without ``feedback`` every block is quantized by itself: least squared error, each column weighted by the mean square of
its input (what llama.cpp calls an importance matrix) and by the magnitude of the weight. With it the columns are
rounded one after the other and the rest makes up for their error, as in GPTQ (arXiv:2210.17323): when the loop reaches
a super-block, its scales are searched for the weights as compensated by then. ``sweeps`` choose every code again given
all others, and every scale and minimum given the codes, in the metric of the damped Hessian, where no step raises the
error.
The bytes are of the same kind and number in all cases, and llama.cpp reads them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq.compensation import compensate, sweep
from bitnet.ptq.protocol import LayerStats, Statistic
from bitnet.quant.ggml import BlockFormat, Fields, GGMLWeight, block_format, fit_fields, magnitude_weighted

TYPE_OF_BITS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
_FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True, kw_only=True)
class KQuant:
    """Quantize to a block format of GGUF.

    Args:
        type: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0, Q4_0, TQ1_0 or TQ2_0; None: the one for ``bits``.
        bits: 2, 3, 4, 5, 6 or 8: Q2_K ... Q6_K, Q8_0; None where ``type`` is given.
        importance: weigh columns by the mean square of their inputs in the search for scales.
        feedback: compensate the error of each column in later ones.
        sweeps: passes of coordinate descent after the feedback.
        damping: share of the mean diagonal added to the Hessian; raised tenfold where it does not suffice.
    """

    type: str | None = None
    bits: int | None = None
    importance: bool = True
    feedback: bool = False
    sweeps: int = 0
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.type is None and self.bits is None:
            raise InputError("type or bits must be given: for example type=Q4_K, or bits=4 for the same")
        if self.bits is not None and self.bits not in TYPE_OF_BITS:
            raise InputError(
                f"bits must be one of {', '.join(map(str, TYPE_OF_BITS))}, got {self.bits}: or give a type"
            )
        if self.type is not None:
            block_format(self.type)
            if self.bits is not None and TYPE_OF_BITS[self.bits] != self.type:
                raise InputError(
                    f"bits={self.bits} is {TYPE_OF_BITS[self.bits]}, but type={self.type}: give one of them"
                )
        if self.sweeps < 0:
            raise InputError(f"sweeps must be 0 or more, got {self.sweeps}")
        if self.sweeps and not self.feedback:
            raise InputError(f"sweeps={self.sweeps} need the Hessian that feedback collects: set feedback=true")
        if not 0 < self.damping <= 1:
            raise InputError(
                f"damping must be above 0 and at most 1 (a share of the mean diagonal), got {self.damping}"
            )

    @property
    def format(self) -> BlockFormat:
        """The block format."""
        return block_format(self.type or TYPE_OF_BITS[self.bits or 0])

    @property
    def requires(self) -> frozenset[Statistic]:
        if self.feedback:
            return frozenset([Statistic.HESSIAN])
        return frozenset([Statistic.MEAN_SQUARE] if self.importance else [])

    @property
    def claimed_bits(self) -> float:
        return self.format.bits

    def quantize(self, weight: Float[Tensor, "out in"], stats: LayerStats | None) -> GGMLWeight:
        """Quantize ``weight``; the arithmetic is in float32. A width that ends within a block: see `GGMLWeight`."""
        form, weight = self.format, weight.float()
        if self.feedback:
            assert stats is not None, "feedback requires the Hessian"
            fields = self._with_feedback(weight, stats)
        else:
            mean_square = None
            if self.importance:
                assert stats is not None, "importance requires the inputs' mean squares"
                mean_square = stats.mean_square
                assert mean_square is not None
            fields = fit_fields(weight, form, magnitude_weighted(weight, form, mean_square))
        return GGMLWeight.from_fields(fields, form.name, weight.shape[1])

    def _with_feedback(self, weight: Tensor, stats: LayerStats) -> Fields:
        assert stats.hessian is not None
        hessian = stats.hessian.float()
        factor = stats.inverse_factor(self.damping)
        columns = weight.t().contiguous()
        columns[hessian.diagonal() == 0] = 0
        importance = hessian.diagonal() if self.importance else torch.ones_like(hessian.diagonal())
        grid = BlockColumns(self.format, columns.shape, importance)
        values = compensate(columns.clone(), factor.upper, grid)
        damped = (
            hessian.clone()
        )  # undamped, sweeps lowered relH by 1 % more and raised the squared error tenfold (Q4_K)
        damped.diagonal().add_(factor.damping * hessian.diagonal().mean())
        for _ in range(self.sweeps):
            values = sweep(columns, values, damped, grid)
        return grid.fields()


class BlockColumns:
    """A block format as the column loop sees it: integers, codes and scales, transposed, columns first.

    Args:
        form: the block format.
        shape: [in, out] of the transposed weight.
        importance: [in], weight of each column's squared error where scales are searched.
    """

    def __init__(self, form: BlockFormat, shape: tuple[int, ...], importance: Tensor) -> None:
        columns, out = shape
        blocks, device = -(-columns // form.block), importance.device
        self._form, self._importance = form, importance
        self._codes = torch.zeros(blocks * form.block, out, device=device)
        self._d = torch.zeros(blocks, out, device=device)
        subs = blocks * (form.block // form.sub)
        self._scales = None if form.scales is None else torch.zeros(subs, out, device=device)
        self._dmin = None if form.mins is None else torch.zeros(blocks, out, device=device)
        self._mins = None if form.mins is None else torch.zeros(subs, out, device=device)
        self._steps = torch.zeros(subs, out, device=device)
        self._offsets = torch.zeros(subs, out, device=device)

    @property
    def span(self) -> int | None:
        return self._form.block

    def fit(self, start: int, columns: Float[Tensor, "span out"]) -> None:
        weight = columns.t().contiguous()  # sums depend on the order in memory: as for the whole matrix
        mean_square = self._importance[start : start + len(columns)]
        fields = fit_fields(weight, self._form, magnitude_weighted(weight, self._form, mean_square))
        block, subs = start // self._form.block, self._subs(start)
        self._d[block] = fields.d[:, 0].float()
        if self._scales is not None and fields.scales is not None:
            self._scales[subs] = fields.scales[:, 0].t().float()
        if self._mins is not None and self._dmin is not None and fields.mins is not None and fields.dmin is not None:
            self._mins[subs], self._dmin[block] = fields.mins[:, 0].t().float(), fields.dmin[:, 0].float()
        self._update(start)

    def round(self, column: Float[Tensor, " out"], index: int) -> Float[Tensor, " out"]:
        sub = index // self._form.sub
        step, offset = self._steps[sub], self._offsets[sub]
        codes = ((column + offset) / step).nan_to_num_(0.0).round_().clamp_(self._form.low, self._form.high)
        self._codes[index] = torch.where(step == 0, 0.0, codes)
        return self._codes[index] * step - offset

    def refit(
        self,
        start: int,
        values: Float[Tensor, "span out"],
        gradient: Float[Tensor, "span out"],
        hessian: Float[Tensor, "span span"],
    ) -> Float[Tensor, "span out"]:
        """Integer scales and minima of each sub-block in turn, then d, then dmin, for the codes there are."""
        n, form = len(values), self._form
        gradient, block = gradient.clone(), start // form.block
        codes = self._codes[start : start + n]
        first = self._subs(start).start
        for at in range(0, n, form.sub):
            rows, sub = slice(at, min(at + form.sub, n)), first + at // form.sub
            for integers, unit, direction, low, high in self._integers(block, codes[rows]):
                move = self._best_move(direction, unit, gradient[rows], hessian[rows, rows])
                moved = (integers[sub] + move).clamp_(low, high)
                change = direction * (unit * (moved - integers[sub]))
                integers[sub] = moved
                gradient.addmm_(hessian[:, rows], change, alpha=-1)
        for scale, direction in self._super_scales(block, codes):
            along, length = (direction * gradient).sum(0), (direction * (hessian @ direction)).sum(0)
            best = (scale[block] + along / length).clamp_(-_FLOAT16_MAX, _FLOAT16_MAX)
            move = best.to(torch.float16).float() - scale[block]
            move = torch.where(move * (move * length - 2 * along) < 0, move, 0.0)
            gradient.addmm_(hessian, direction * move, alpha=-1)
            scale[block] += move
        self._update(start)
        return codes * self._expanded(self._steps, start, n) - self._expanded(self._offsets, start, n)

    def fields(self) -> Fields:
        """What `compensate` and `sweep` have chosen so far."""

        def by_block(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            return tensor.t().to(dtype).unflatten(1, (len(self._d), -1)).contiguous()

        scales = None if self._scales is None else by_block(self._scales, torch.int8)
        mins = None if self._mins is None else by_block(self._mins, torch.int8)
        dmin = None if self._dmin is None else self._dmin.t().to(torch.float16).contiguous()
        d = self._d.t().to(torch.float16).contiguous()
        return Fields(by_block(self._codes, torch.int8), d, scales, dmin, mins)

    def _integers(self, block: int, codes: Tensor) -> list[tuple[Tensor, Tensor, Tensor, int, int]]:
        """What a sub-block's integers are: where they stand, value of one, what it multiplies, and their range."""
        found = list[tuple[Tensor, Tensor, Tensor, int, int]]()
        if self._scales is not None and self._form.scales is not None:
            found.append((self._scales, self._d[block], codes, *self._form.scales))
        if self._mins is not None and self._dmin is not None and self._form.mins is not None:
            found.append((self._mins, self._dmin[block], -torch.ones_like(codes), 0, self._form.mins))
        return found

    def _super_scales(self, block: int, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """d and dmin, and what each multiplies in the columns of the block."""
        start, n = block * self._form.block, len(codes)
        scaled = codes if self._scales is None else codes * self._expanded(self._scales, start, n)
        found = [(self._d, scaled)]
        if self._mins is not None and self._dmin is not None:
            found.append((self._dmin, -self._expanded(self._mins, start, n)))
        return found

    @staticmethod
    def _best_move(direction: Tensor, unit: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
        """Whole steps of ``unit * direction`` that lower the error most; 0 where they cannot."""
        along = (direction * gradient).sum(0)
        length = unit * (direction * (hessian @ direction)).sum(0)
        return torch.where(length.abs() > 0, along / length, 0.0).round_().nan_to_num_(0.0)

    def _subs(self, start: int) -> slice:
        each = self._form.block // self._form.sub
        block = start // self._form.block
        return slice(block * each, (block + 1) * each)

    def _expanded(self, per_sub: Tensor, start: int, n: int) -> Tensor:
        return per_sub[self._subs(start)].repeat_interleave(self._form.sub, dim=0)[:n]

    def _update(self, start: int) -> None:
        block, subs = start // self._form.block, self._subs(start)
        self._steps[subs] = self._d[block] if self._scales is None else self._d[block] * self._scales[subs]
        if self._mins is not None and self._dmin is not None:
            self._offsets[subs] = self._dmin[block] * self._mins[subs]
