"""How well a model predicts a continuous text, window by window, and how far it is from the full-precision model.

The text is cut into windows of ``window`` tokens, one every ``stride`` tokens. A window predicts those of its tokens
that no earlier window predicted, except its very first, which has nothing before it:

    stride = window        |.xxxxxxx|.xxxxxxx|.xxx|        . read only      x predicted
    stride = window / 2    |.xxxxxxx|
                               |....xxxx|
                                   |....xxxx| ...

Without overlap (the protocol of most published figures) one token a window is lost, and tokens at its beginning have
little before them. With overlap every token but the text's first is predicted, each with at least ``window - stride``
tokens before it, at ``window / stride`` times the price. The last window may be short. Losses of different protocols
are of different tokens: they cannot be subtracted.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.evaluation.bootstrap import bootstrap_intervals
from bitnet.evaluation.compare import TokenScores, joined_scores, score_tokens
from bitnet.evaluation.perplexity import LossSummary, evaluating


class Span(NamedTuple):
    """One window: tokens [begin, end) are read, tokens [first, end) are predicted."""

    begin: int
    end: int
    first: int


@dataclass(frozen=True, slots=True, eq=False)
class TextEvaluation:
    """What a model made of a text. Means are over predicted tokens, in nats; sums are kept in float64.

    Attributes:
        scores: of each predicted token in the order of the text, on the CPU.
        window_tokens: int64 [windows], predicted tokens of each window that predicts any.
        window: tokens in a window.
        stride: tokens from one window's begin to the next one's.
        text_hash: SHA-256 of the ids.
        bytes_per_token: UTF-8 bytes of the text for each token; None where that is not known.
    """

    scores: TokenScores
    window_tokens: Tensor
    window: int
    stride: int
    text_hash: str
    bytes_per_token: float | None = None

    @property
    def n_tokens(self) -> int:
        """Predicted tokens."""
        return len(self.scores.nll)

    @property
    def loss(self) -> LossSummary:
        n_bytes = None if self.bytes_per_token is None else self.bytes_per_token * self.n_tokens
        return LossSummary(float(self.scores.nll.double().sum()), self.n_tokens, n_bytes)

    @property
    def nll(self) -> float:
        return self.loss.nll

    @property
    def perplexity(self) -> float:
        return self.loss.perplexity

    @property
    def gap(self) -> float | None:
        """Mean loss above the reference's; negative where the model is better. None without a reference."""
        return _mean(self._gaps)

    @property
    def kl(self) -> float | None:
        """Mean KL(reference || model); None without a reference."""
        return _mean(self.scores.kl)

    @property
    def top1_agreement(self) -> float | None:
        """Share of tokens for which both models hold the same one for the likeliest; None without a reference."""
        return _mean(self.scores.agrees)

    @property
    def of_reference(self) -> "TextEvaluation | None":
        """The reference's own evaluation, from the same pass; None without a reference."""
        if self.scores.reference_nll is None:
            return None
        scores = TokenScores(self.scores.reference_nll)
        return TextEvaluation(
            scores, self.window_tokens, self.window, self.stride, self.text_hash, self.bytes_per_token
        )

    def intervals(self, resamples: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """95 % intervals of ``nll`` and, with a reference, of ``gap`` (paired) and ``kl``, by resampling windows.

        Raises:
            InputError: fewer than two windows.
        """
        columns = {"nll": self.scores.nll, "gap": self._gaps, "kl": self.scores.kl}
        columns = {name: values for name, values in columns.items() if values is not None}
        owner = torch.arange(len(self.window_tokens)).repeat_interleave(self.window_tokens)
        empty = torch.zeros(len(self.window_tokens), dtype=torch.float64)
        sums = torch.stack([empty.index_add(0, owner, values.double()) for values in columns.values()], dim=1)
        intervals = bootstrap_intervals(sums, self.window_tokens, resamples=resamples, seed=seed).tolist()
        return {name: (low, high) for name, (low, high) in zip(columns, intervals, strict=True)}

    def protocol(self) -> dict[str, Any]:
        """What was predicted, for a record: two evaluations of equal protocols are of the same tokens."""
        return {
            "text": "joined",
            "text_hash": self.text_hash,
            "window": self.window,
            "stride": self.stride,
            "predicted_tokens": self.n_tokens,
        }

    def figures(self, bootstrap: int | None = 2000) -> dict[str, Any]:
        """Fields of a run's record by their names there, intervals from ``bootstrap`` draws (None: no intervals).

        A perplexity beyond float64 is None; so are intervals of a text that fits into one window.
        """
        draw = bootstrap is not None and len(self.window_tokens) > 1
        intervals = self.intervals(bootstrap) if draw and bootstrap is not None else {}
        return {
            "nll": self.nll,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.loss.bits_per_byte,
            "nll_interval": list(intervals["nll"]) if "nll" in intervals else None,
            "gap": self.gap,
            "gap_interval": list(intervals["gap"]) if "gap" in intervals else None,
            "kl": self.kl,
            "top1_agreement": self.top1_agreement,
            "evaluation": self.protocol(),
        }

    @property
    def _gaps(self) -> Tensor | None:
        if self.scores.reference_nll is None:
            return None
        return self.scores.nll.double() - self.scores.reference_nll.double()


def evaluate_text(
    model: nn.Module,
    ids: Tensor,
    *,
    window: int = 256,
    stride: int | None = None,
    batch_size: int = 8,
    reference: nn.Module | None = None,
    max_tokens: int | None = None,
    bytes_per_token: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TextEvaluation:
    """Return how well ``model`` predicts the text ``ids``, int64 [tokens]: see the module for the windows.

    Args:
        model: A causal language model, called as ``model(input_ids=..., use_cache=False).logits`` where its first
            parameter lies. Its gradients and its training mode are as before afterwards.
        ids: The text.
        window: Tokens that the model sees at once, at least 2.
        stride: Tokens from one window to the next, 1 to ``window``; None for ``window``: no overlap.
        batch_size: Windows in a forward pass. Memory is the logits of one pass, of both models with ``reference``.
        reference: The full-precision model, run on the same batches.
        max_tokens: Read only so many tokens of the text.
        bytes_per_token: UTF-8 bytes of the text per token, for bits per byte.
        progress: Called after every batch with windows done and windows in all.

    Raises:
        InputError: A size that is out of range, a text without a token to predict, or a loss that is not finite.
    """
    stride = window if stride is None else stride
    ids = ids[:max_tokens]
    _check(ids, window, stride, batch_size)
    spans = list(windows_of(len(ids), window, stride))
    parts: list[TokenScores] = []
    done = 0
    models = [model] if reference is None else [model, reference]
    with torch.no_grad(), evaluating(*models):
        for batch in _batches(spans, batch_size):
            parts.append(_score_batch(models, ids, batch))
            done += len(batch)
            if progress is not None:
                progress(done, len(spans))
    scores = joined_scores(parts)
    for name, nll in (("model", scores.nll), ("reference model", scores.reference_nll)):
        if nll is not None and not math.isfinite(total := float(nll.double().sum())):
            raise InputError(f"the {name}'s loss on this text is {total}: its weights or logits hold NaN or infinity")
    window_tokens = torch.tensor([span.end - span.first for span in spans])
    text_hash = hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()
    return TextEvaluation(scores, window_tokens, window, stride, text_hash, bytes_per_token)


def windows_of(n_tokens: int, window: int, stride: int) -> Iterator[Span]:
    """The windows of a text that predict at least one token."""
    predicted = 0  # tokens before this one need no prediction any more
    for begin in range(0, n_tokens, stride):
        if predicted >= n_tokens:
            return
        end = min(begin + window, n_tokens)
        first = max(begin + 1, predicted)
        if first < end:
            yield Span(begin, end, first)
        predicted = end


def _batches(spans: list[Span], batch_size: int) -> Iterator[list[Span]]:
    """Neighbours of equal shape: the first window may predict more than the others, and the last be shorter."""
    for _, group in groupby(spans, key=lambda span: (span.end - span.begin, span.first - span.begin)):
        alike = list(group)
        yield from (alike[begin : begin + batch_size] for begin in range(0, len(alike), batch_size))


def _score_batch(models: list[nn.Module], ids: Tensor, batch: list[Span]) -> TokenScores:
    input_ids = torch.stack([ids[span.begin : span.end] for span in batch])
    first = batch[0].first - batch[0].begin
    logits = [
        model(input_ids=input_ids.to(next(model.parameters()).device), use_cache=False)
        .logits[:, first - 1 : -1]
        .flatten(0, 1)
        for model in models
    ]
    device = logits[0].device
    reference = logits[1].to(device) if len(logits) > 1 else None
    return score_tokens(logits[0], input_ids[:, first:].flatten().to(device), reference).cpu()


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.double().mean())


def _check(ids: Tensor, window: int, stride: int, batch_size: int) -> None:
    if ids.dim() != 1 or ids.is_floating_point():
        raise InputError(f"a text is one row of whole numbers, got {list(ids.shape)} of {ids.dtype}")
    if len(ids) < 2:
        raise InputError(f"expected a text of at least 2 tokens, got {len(ids)}: there is nothing to predict")
    if window < 2:
        raise InputError(f"evaluation.window must be at least 2 tokens, got {window}: the first is not predicted")
    if not 1 <= stride <= window:
        raise InputError(
            f"evaluation.stride must be 1 to the window's {window} tokens, got {stride}: more would skip text"
        )
    if batch_size < 1:
        raise InputError(f"evaluation.batch_size must be at least 1, got {batch_size}")
