"""What a set of results says, in words: computed from the rows, with the intervals that were measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet.report.page.rows import DENSE, PTQ, QAT, Row

SAME_SIZE = 0.005  # bits a weight: less is no difference in size
NEXT_SIZE = 0.5  # bits a weight: a rival that takes so much more is still one
NEAR = 0.01  # nats a token: what passes for lossless
SIZES = (2.0, 3.0, 5.0)  # bits a weight of the key figures


@dataclass(frozen=True, slots=True)
class Headline:
    """A claim, and the sentences that carry it."""

    claim: str
    support: list[str]


@dataclass(frozen=True, slots=True)
class Figure:
    """One of the key figures: what it is, its value, and of what."""

    name: str
    value: str
    note: str


def headline(rows: Sequence[Row]) -> Headline:
    """Return what ``rows`` (all evaluated on the same tokens) say of training against quantizing afterwards."""
    measured = [row for row in rows if row.nll is not None]
    trained, after = _of(measured, QAT), _of(measured, PTQ)
    if trained and after:
        return _compared(trained, after, _of(measured, DENSE))
    if after:
        return _post_training(after)
    if trained:
        best = min(trained, key=_loss)
        return Headline(f"{best.label} in {bits(best)}: {_standing(best)}", _others(trained, best))
    if measured:
        best = min(measured, key=_loss)
        return Headline(f"Full precision only: {best.label} has a perplexity of {best.perplexity:.2f}", [])
    return Headline("No result has a loss yet", ["Nothing can be compared: the records hold sizes alone."])


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Return the figures that stand below the headline."""
    dense = [row for row in rows if row.kind == DENSE and row.perplexity is not None]
    found: list[Figure] = []
    if dense:
        compared = {round(_loss(row) - row.gap, 9) for row in rows if row.gap is not None and row.nll is not None}
        best = min(dense, key=lambda row: (round(_loss(row), 9) not in compared, _loss(row)))  # what gaps are to first
        found.append(Figure("Full precision", f"{best.perplexity:.2f}", f"perplexity · {megabytes(best.bytes)}"))
    low = 0.0
    quantized = [row for row in rows if row.kind != DENSE and row.nll is not None]
    for size in SIZES:
        inside = [row for row in quantized if low < row.bits <= size]
        if inside:
            best = min(inside, key=_loss)
            of = f"{low:g} to {size:g} bits" if low else f"{size:g} bits or less"
            value = f"+{best.gap:.3f} nats" if best.gap is not None and best.gap >= 0 else _perplexity_or_gap(best)
            found.append(Figure(f"Best in {of}", value, f"{best.label} · {bits(best)}"))
        low = size
    return found


def bits(row: Row) -> str:
    """ "2.15 bits"."""
    return f"{row.bits:.2f} bits"


def megabytes(count: int) -> str:
    """ "13.6 MB", of 10^6 bytes."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def nats(value: float) -> str:
    """ "0.078": three decimals, or two digits of what is smaller."""
    return f"{value:.3f}" if abs(value) >= 0.0095 else f"{value:.2g}"


def _compared(trained: Sequence[Row], after: Sequence[Row], dense: Sequence[Row]) -> Headline:
    """The trained model that is furthest ahead of the best post-training result of its size or a little above."""

    def rival_of(row: Row) -> Row:
        rivals = [each for each in after if each.bits <= row.bits + NEXT_SIZE]
        return min(rivals, key=_loss) if rivals else min(after, key=lambda each: (each.bits, _loss(each)))

    best = max(trained, key=lambda row: (_loss(rival_of(row)) - _loss(row), -_loss(row)))
    rival = rival_of(best)
    ahead = _loss(rival) - _loss(best)  # > 0: training is better
    support = [_sentence(best), _sentence(rival), _difference(ahead, difference_interval(rival, best))]
    if all(row.bits > best.bits + SAME_SIZE for row in after):
        support.append(f"No post-training result here takes as few bits as {best.label}.")
    return Headline(_claim(best, rival, ahead), [" ".join(support), *_beside_control(best, dense), *_lossless(after)])


def _beside_control(best: Row, dense: Sequence[Row]) -> list[str]:
    """What the tokens alone are worth: the original, trained on in full precision, where a gap is not to it anyway."""
    for row in dense:
        is_reference = best.gap is not None and abs(_loss(best) - best.gap - _loss(row)) < 1e-9
        if row.train_tokens == best.train_tokens > 0 and not is_reference:
            apart = _loss(best) - _loss(row)
            side = "above" if apart >= 0 else "below"
            return [
                f"Trained on with the same tokens in full precision, the model has a perplexity of "
                f"{row.perplexity:.2f}: {best.label} is {nats(abs(apart))} nats {side} that."
            ]
    return []


def _claim(best: Row, rival: Row, ahead: float) -> str:
    interval = difference_interval(rival, best)
    training, other = f"training in {bits(best)}", f"{rival.label} in {bits(rival)}"
    if interval is not None and interval[0] <= 0 <= interval[1]:
        return f"{training.capitalize()} and {other} cannot be told apart"
    winner, loser = (best, rival) if ahead > 0 else (rival, best)
    words = {best.id: training, rival.id: other}
    if winner.bits <= loser.bits + SAME_SIZE:  # better in both
        claim = f"{words[winner.id]} beats {words[loser.id]} by {nats(abs(ahead))} nats a token"
    else:
        claim = f"{words[loser.id]} loses {nats(abs(ahead))} nats a token to {words[winner.id]}"
    return claim[0].upper() + claim[1:] if claim.startswith("training") else claim


def _difference(ahead: float, interval: tuple[float, float] | None) -> str:
    words = f"Training is {'ahead' if ahead > 0 else 'behind'} by {nats(abs(ahead))} nats"
    if interval is None:
        return f"{words}, of which no interval is known (evaluation.compare=true measures one)."
    low, high = interval if ahead > 0 else (-interval[1], -interval[0])
    return f"{words}: {nats(low)} to {nats(high)} with both 95 % intervals at their least favourable ends."


def _post_training(after: Sequence[Row]) -> Headline:
    fewest = min(after, key=lambda row: (row.bits, _loss(row)))
    best = min(after, key=_loss)
    near = [row for row in after if row.gap is not None and row.gap <= NEAR]
    least = min(near, key=lambda row: (row.bits, _loss(row))) if near else best
    if near:
        claim = f"{least.label} is within {NEAR} nats a token of full precision in {bits(least)}"
    else:
        claim = f"{best.label} comes closest to full precision: {_standing(best)} in {bits(best)}"
    told = list(dict.fromkeys([least.id, fewest.id, best.id]))
    by_id = {row.id: row for row in after}
    return Headline(claim, [" ".join(_sentence(by_id[each]) for each in told)])


def _lossless(after: Sequence[Row]) -> list[str]:
    near = [row for row in after if row.gap is not None and row.gap <= NEAR]
    if not near:
        return []
    least = min(near, key=lambda row: (row.bits, _loss(row)))
    return [f"Within {NEAR} nats of full precision needs {bits(least)} after training ({least.label})."]


def _others(rows: Sequence[Row], best: Row) -> list[str]:
    sentences = [_sentence(best)]
    if len(rows) > 1:
        worst = max(rows, key=_loss)
        sentences.append(
            f"It is the best of {len(rows)} trained results; the last is {worst.label}, {_standing(worst)}."
        )
    return [" ".join(sentences)]


def _sentence(row: Row) -> str:
    how = {QAT: "trained in", PTQ: "quantized after training to"}[row.kind]
    return f"{row.label}, {how} {bits(row)} a weight, is {_standing(row)} (perplexity {row.perplexity:.2f})."


def _standing(row: Row) -> str:
    if row.gap is None:
        return f"at a loss of {_loss(row):.3f} nats a token{_span(row.interval)}"
    where = "above" if row.gap >= 0 else "below"
    return f"{nats(abs(row.gap))} nats {where} full precision{_span(row.gap_interval)}"


def _span(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" (95 % interval {nats(interval[0])} to {nats(interval[1])})"


def _perplexity_or_gap(row: Row) -> str:
    return f"{row.gap:.3f} nats" if row.gap is not None else f"{row.perplexity:.2f} perplexity"


def difference_interval(one: Row, other: Row) -> tuple[float, float] | None:
    """Bounds of the loss of ``one`` less that of ``other``, from the intervals of their gaps; None without both.

    The intervals do not say how the two vary together, so their ends are subtracted crosswise: never too narrow, as
    long as both gaps are to the same model.
    """
    if one.gap is None or other.gap is None or one.gap_interval is None or other.gap_interval is None:
        return None
    # Two gaps to one model differ as the losses do; to two models they do not.
    if not math.isclose(one.gap - other.gap, _loss(one) - _loss(other), abs_tol=1e-9):
        return None
    return one.gap_interval[0] - other.gap_interval[1], one.gap_interval[1] - other.gap_interval[0]


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.kind == kind]


def _loss(row: Row) -> float:
    assert row.nll is not None
    return row.nll
