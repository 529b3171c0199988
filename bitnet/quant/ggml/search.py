"""Scales, minima and codes of least weighted squared error for every block of a matrix.

A block's error is ``sum v (x - value)^2``. It is lowered in four steps, all blocks at once:

1. each sub-block by itself: a sweep of steps; for each the codes, then the step and the offset that suit these codes
   best (weighted least squares, offset >= 0); the best of the sweep is kept;
2. d: a sweep again, for the integer scales that stand for the steps best, each weighted by what an error of it costs;
   dmin and the integer minima likewise;
3. with d and dmin as stored: the neighbouring integer scales and minima of each sub-block, with codes rounded anew;
4. with codes and integers fixed: d and dmin by least squares, rounded to float16, kept where the error is lower.

3 and 4 repeat. Neither can raise the error. float32 throughout; tensors are [weights of a sub-block, sub-blocks,
blocks], so that sums run over the first dimension and vectorise over the others.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant.ggml.formats import BlockFormat, Fields, round_to_codes
from bitnet.quant.ggml.weight import in_blocks

_CHUNK = 2**18  # weights at a time: temporaries of 1 MB, about ten of them
_SWEEP = 19  # steps tried: with 37 the mean error falls by 0.2 % at most, in twice the time
_CLIPPING = {16: 0.9, 32: 2.0, 256: 3.5}  # weights that share a step -> levels by which the largest may leave the range
_FLOAT16_MAX = torch.finfo(torch.float16).max

Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""d, scales, dmin, mins"""


def fit_fields(
    weight: Float[Tensor, "out in"],
    form: BlockFormat,
    importance: Float[Tensor, "rows in"] | None = None,
    rounds: int = 2,
) -> Fields:
    """Fields of least error for ``weight``.

    Args:
        weight: any width; the last block of a row is filled up with zeros that weigh nothing.
        form: the block format.
        importance: weight of each squared error, [1, in] or [out, in], not negative; None: all equal.
        rounds: how often scales are refined after they were rounded.

    Raises:
        InputError: NaN, an infinity or a value beyond float16 in ``weight``; NaN or a negative value in ``importance``.
    """
    x = in_blocks(weight, form)
    if x.numel() and not bool(x.abs().max() <= _FLOAT16_MAX):
        raise InputError(f"{form.name} stores scales as float16: weights must be finite and at most {_FLOAT16_MAX:g}")
    rows, blocks, _ = x.shape
    v = in_blocks(_normalised(importance, weight), form).expand_as(x).reshape(-1, form.block)
    flat = x.reshape(-1, form.block)
    step = max(1, _CHUNK // form.block)
    chunks = [_fit(flat[at : at + step], v[at : at + step], form, rounds) for at in range(0, len(flat), step)]
    d, scales, dmin, mins = (
        torch.cat([each for each in parts if each is not None]).unflatten(0, (rows, blocks)) if has else None
        for has, *parts in ((chunks[0][i] is not None, *(chunk[i] for chunk in chunks)) for i in range(4))
    )
    assert d is not None
    empty = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return with_nearest_codes(Fields(empty, d, scales, dmin, mins), x, form)


def with_nearest_codes(fields: Fields, blocks: Float[Tensor, "rows blocks block"], form: BlockFormat) -> Fields:
    """``fields`` with the codes nearest to ``blocks``, for the scales and minima as they are stored."""
    codes = round_to_codes(blocks, form, fields.steps(), fields.offsets())
    return Fields(codes, fields.d, fields.scales, fields.dmin, fields.mins)


def magnitude_weighted(
    weight: Float[Tensor, "out in"], form: BlockFormat, mean_square: Float[Tensor, " in"] | None
) -> Float[Tensor, "out in"]:
    """Importance ``m_j sqrt(2 s^2 + w^2)``, s^2 the block's mean square, m the inputs' (1 where it is None).

    Larger weights count more: their errors are those that correlated inputs add up. On the reference model it lowers
    the Hessian-weighted error of Q2_K by 5 % with m and 8 % without. Source: ggml's use of importance matrices.
    """
    x = in_blocks(weight, form)
    square = x * x
    factor = (2 * square.mean(-1, keepdim=True) + square).sqrt_().flatten(-2)[:, : weight.shape[-1]]
    return factor if mean_square is None else factor * mean_square.float()


def _normalised(importance: Tensor | None, weight: Tensor) -> Tensor:
    """float32 [1 or out, in] with mean 1; a millionth for what is zero, so that dead inputs leave sums positive."""
    if importance is None:
        return torch.ones((1, weight.shape[-1]), device=weight.device)
    v = importance.float()
    if not bool(((v >= 0) & torch.isfinite(v)).all()):
        raise InputError("importance must be finite and not negative: it is a mean of squares")
    mean = v.mean()
    return v / mean + 1e-6 if bool(mean > 0) else torch.ones_like(v)


@dataclass(slots=True)
class _Found:
    """The best so far: error [...], and what gave it."""

    error: Tensor
    values: tuple[Tensor, ...]

    def keep_better(self, error: Tensor, *values: Tensor) -> None:
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.values = tuple(torch.where(better, new, old) for new, old in zip(values, self.values, strict=True))


def _fit(x: Tensor, v: Tensor, form: BlockFormat, rounds: int) -> Parts:
    """Of blocks [n, block]."""
    x, v = (each.unflatten(-1, (-1, form.sub)).permute(2, 1, 0).contiguous() for each in (x, v))
    step, offset = (_symmetric_steps(x, v, form), None) if form.mins is None else _affine_steps(x, v, form)
    if form.scales is None:
        return _stored(step[0]), None, None, None
    codes = _round(x, step, offset, form)
    d, scales = _super_scale(step, (codes.square_() * v).sum(0), *form.scales)
    dmin, mins = (None, None) if offset is None else _super_scale(offset, v.sum(0), 0, form.mins or 0)
    state = _Refinement(x, v, form, d, scales, dmin, mins)
    for _ in range(rounds):
        state.try_neighbours()
        state.refit()
    if rounds:
        state.try_neighbours()
    return state.parts()


def _round(x: Tensor, step: Tensor, offset: Tensor | None, form: BlockFormat) -> Tensor:
    inverse = torch.where(step == 0, 0.0, 1 / step)
    codes = x * inverse if offset is None else (x + offset).mul_(inverse)
    return codes.round_().clamp_(form.low, form.high)


def _error(x: Tensor, v: Tensor, step: Tensor, offset: Tensor | None, form: BlockFormat) -> Tensor:
    values = _round(x, step, offset, form).mul_(step).sub_(x)
    if offset is not None:
        values.sub_(offset)
    return values.mul_(values).mul_(v).sum(0)


def _least_squares(x: Tensor, v: Tensor, sums: tuple[Tensor, Tensor], q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The error less sum v x^2, and the step and the offset (>= 0) that suit the codes best."""
    sv, sx = sums
    vq = v * q
    sq = vq.sum(0)
    sqq, sqx = (vq * q).sum(0), vq.mul_(x).sum(0)
    det = sv * sqq - sq * sq
    flat = det <= 1e-6 * sv * sqq
    det = torch.where(flat, 1.0, det)
    step = (sv * sqx - sx * sq) / det
    offset = (sq * sqx - sqq * sx) / det
    alone = flat | (offset < 0)
    step = torch.where(alone, torch.where(sqq > 0, sqx / sqq, 0.0), step)
    offset = torch.where(alone, 0.0, offset)
    error = step * (step * sqq - 2 * (sqx + offset * sq)) + offset * (offset * sv + 2 * sx)
    return error, step, offset


def _affine_steps(x: Tensor, v: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    low, high = x.amin(0).clamp_(max=0), x.amax(0)
    span = (high - low).clamp_(min=0)
    sums = v.sum(0), (v * x).sum(0)
    zero = torch.zeros_like(low)
    found = _Found(torch.full_like(low, torch.inf), (zero, -low))
    for k in range(_SWEEP):
        step = span / (form.high - 0.9 + 1.8 * k / (_SWEEP - 1))
        for phase in (0.0, 0.5):  # one phase alone ends in a poor local minimum now and then, at 10 % more error
            found.keep_better(*_least_squares(x, v, sums, _round(x, step, phase * step - low, form)))
    for _ in range(2):
        step, offset = found.values
        found.keep_better(*_least_squares(x, v, sums, _round(x, step, offset, form)))
    return found.values[0], found.values[1]


def _symmetric_steps(x: Tensor, v: Tensor, form: BlockFormat) -> Tensor:
    largest = x.abs().amax(0)
    found = _Found(torch.full_like(largest, torch.inf), (torch.zeros_like(largest),))

    def consider(step: Tensor) -> None:
        q = _round(x, step, None, form)
        vq = v * q
        sqq, sqx = vq.mul(q).sum(0), vq.mul_(x).sum(0)
        best = torch.where(sqq > 0, sqx / sqq, 0.0)
        found.keep_better(-best * sqx, best)

    fewest = max(-form.low - 0.9, 1.0)
    for k in range(_SWEEP):
        ratio = fewest + (-form.low + _CLIPPING[form.sub] - fewest) * k / (_SWEEP - 1)
        consider(largest / ratio)
        if form.low != -form.high:
            consider(-largest / ratio)
    for _ in range(2):
        consider(found.values[0])
    return found.values[0]


def _stored(d: Tensor) -> Tensor:
    return d.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).to(torch.float16)


def _super_scale(numbers: Tensor, curvature: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """float16 d [blocks] and integers [subs, blocks] with ``d * integer`` near ``numbers`` [subs, blocks]."""
    largest = numbers.abs().amax(0)
    top = max(-low, high)
    found = _Found(torch.full_like(largest, torch.inf), (torch.zeros_like(largest),))

    def consider(d: Tensor) -> None:
        integers = torch.where(d == 0, 0.0, numbers / d).round_().clamp_(low, high)
        ci = curvature * integers
        sii, six = (ci * integers).sum(0), (ci * numbers).sum(0)
        best = torch.where(sii > 0, six / sii, 0.0)
        found.keep_better(-best * six, best)

    for k in range(_SWEEP):
        d = largest / (top - 0.9 + 1.8 * k / (_SWEEP - 1))
        consider(d)
        if low < 0:
            consider(-d)
    consider(found.values[0])
    d = _stored(found.values[0])
    integers = torch.where(d == 0, 0.0, numbers / d.float()).round_().clamp_(low, high)
    return d, integers


@dataclass(slots=True)
class _Refinement:
    """Blocks x with weights v, and their scales: d and dmin float16 [blocks], integers float32 [subs, blocks]."""

    x: Tensor
    v: Tensor
    form: BlockFormat
    d: Tensor
    scales: Tensor
    dmin: Tensor | None
    mins: Tensor | None

    def try_neighbours(self) -> None:
        """Move each sub-block's integers a step or, in 4 bits, two to either side where that lowers its error."""
        assert self.form.scales is not None
        moves = (0, -1, 1, -2, 2) if self.form.mins == 15 else (0, -1, 1)
        d = self.d.float()
        found = _Found(torch.full_like(self.scales, torch.inf), (self.scales,))
        if self.mins is not None:
            found.values += (self.mins,)
        for move in moves:
            scales = (self.scales + move).clamp(*self.form.scales)
            if self.mins is None or self.dmin is None:
                found.keep_better(_error(self.x, self.v, d * scales, None, self.form), scales)
                continue
            for shift in moves:
                mins = (self.mins + shift).clamp(0, self.form.mins)
                error = _error(self.x, self.v, d * scales, self.dmin.float() * mins, self.form)
                found.keep_better(error, scales, mins)
        self.scales = found.values[0]
        if self.mins is not None:
            self.mins = found.values[1]

    def refit(self) -> None:
        """d and dmin by least squares for the codes and integers there are; kept where, rounded, they are better."""
        d = self.d.float()
        offset = None if self.mins is None or self.dmin is None else self.dmin.float() * self.mins
        q = _round(self.x, d * self.scales, offset, self.form).mul_(self.scales)
        vq = self.v * q
        qq, qx = (vq * q).sum((0, 1)), (vq * self.x).sum((0, 1))
        if self.mins is None or self.dmin is None:
            new = _stored(torch.where(qq > 0, qx / qq, d)).float()
            better = (new - d) * ((new + d) * qq - 2 * qx) < 0
            self.d = torch.where(better, new, d).to(torch.float16)
            return
        dmin, vm = self.dmin.float(), self.v * self.mins
        qm, mm, mx = (vq * self.mins).sum((0, 1)), (vm * self.mins).sum((0, 1)), (vm * self.x).sum((0, 1))
        det = qq * mm - qm * qm
        solvable = det > 1e-6 * qq * mm
        det = torch.where(solvable, det, 1.0)
        new = _stored(torch.where(solvable, (qx * mm - mx * qm) / det, d)).float()
        new_min = _stored(torch.where(solvable, (qx * qm - mx * qq) / det, dmin).clamp(min=0)).float()

        def cost(d: Tensor, dmin: Tensor) -> Tensor:
            return d * (d * qq - 2 * dmin * qm - 2 * qx) + dmin * (dmin * mm + 2 * mx)

        better = cost(new, new_min) < cost(d, dmin)
        self.d = torch.where(better, new, d).to(torch.float16)
        self.dmin = torch.where(better, new_min, dmin).to(torch.float16)

    def parts(self) -> Parts:
        mins = None if self.mins is None else self.mins.T.to(torch.int8)
        return self.d, self.scales.T.to(torch.int8), self.dmin, mins
