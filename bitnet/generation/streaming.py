"""A prompt in, pieces of text out."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bitnet.errors import InputError
from bitnet.generation.cache import CachedModel
from bitnet.generation.options import Sampling
from bitnet.generation.prompt import check_ids, context_limit, end_ids, prompt_ids
from bitnet.generation.sampling import Sampler
from bitnet.generation.text import Detokenizer, StopFilter
from bitnet.generation.tokens import new_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Finish = Literal["end", "stop", "length", "context", "interrupted"]


@dataclass(slots=True)
class Statistics:
    """How a generation went, so far.

    Attributes:
        prompt_tokens: of the prompt.
        reused_tokens: of these, read before by the `CachedModel` that was given.
        new_tokens: generated; the one that ended the text is not counted.
        prefill_seconds: from the start to the first token's draw.
        decode_seconds: from there to the last token's, whatever the reader of the text did in between included.
        finish: why it ended: "end" (a token for it), "stop" (a stop text), "length" (``max_new_tokens``), "context"
            (the model's is full), "interrupted" (not read to its end).
    """

    prompt_tokens: int
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish: Finish = "interrupted"

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens of the prompt that were read, a second; 0 before the first token is there."""
        read = self.prompt_tokens - self.reused_tokens
        return read / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first one, a second; 0 where there are none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds and self.new_tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A text and how it came about."""

    text: str
    statistics: Statistics


class TextStream(Iterator[str]):
    """Pieces of text, each not empty; ``statistics`` is up to date after each."""

    def __init__(self, pieces: Iterator[str], statistics: Statistics) -> None:
        self._pieces, self.statistics = pieces, statistics

    def __next__(self) -> str:
        return next(self._pieces)


def stream(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    cached: CachedModel | None = None,
) -> TextStream:
    """Continue ``prompt``, piece by piece: whole characters, without special tokens, without the stop text.

    The pieces together are the text of all new tokens behind the prompt.

    Args:
        model: a causal language model, dense or quantized; it computes in evaluation mode and is as before afterwards.
        tokenizer: the model's.
        prompt: a text, or ids (`chat_ids` makes those of a conversation).
        sampling: how tokens are chosen and what ends the text; None: `Sampling` with its defaults.
        cached: a `CachedModel` of ``model`` that was used before: what it has read and ``prompt`` begins with is not
            read again. One text at a time: what another one read must not come between.

    Raises:
        InputError: a prompt that is empty, too long for the model's context, or not of its vocabulary. It comes
            from this call, not from the first piece.
            And, from a piece: ``cached`` has read something else since the piece before.
    """
    sampling = Sampling() if sampling is None else sampling
    ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else [int(each) for each in prompt]
    check_ids(model, ids)
    cached = CachedModel(model) if cached is None else cached
    if cached.model is not model:
        raise InputError("`cached` belongs to another model: make one with CachedModel(model)")
    statistics = Statistics(prompt_tokens=len(ids))
    return TextStream(_pieces(cached, tokenizer, ids, sampling, statistics), statistics)


def complete(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
) -> Completion:
    """What `stream` gives, at once."""
    pieces = stream(model, tokenizer, prompt, sampling)
    return Completion("".join(pieces), pieces.statistics)


def _pieces(
    cached: CachedModel,
    tokenizer: "PreTrainedTokenizerBase",
    ids: list[int],
    sampling: Sampling,
    statistics: Statistics,
) -> Iterator[str]:
    training = cached.model.training
    cached.model.eval()
    try:
        text, stops = Detokenizer(tokenizer, ids), StopFilter(sampling.stop)
        for token in _tokens(cached, tokenizer, ids, sampling, statistics):
            piece = stops.push(text.push(token))
            if piece:
                yield piece
            if stops.stopped:
                statistics.finish = "stop"
                return
        rest = stops.push(text.end())
        if stops.stopped:
            statistics.finish = "stop"
        rest += "" if stops.stopped else stops.end()
        if rest:
            yield rest
    finally:
        cached.model.train(training)


def _tokens(
    cached: CachedModel,
    tokenizer: "PreTrainedTokenizerBase",
    ids: list[int],
    sampling: Sampling,
    statistics: Statistics,
) -> Iterator[int]:
    """The new tokens, counted and timed."""
    began = time.perf_counter()
    statistics.reused_tokens = cached.keep(ids)
    known = max(tokenizer.get_vocab().values()) + 1  # a model can have more rows, for which there is no text
    limit = context_limit(cached.model)
    room = sampling.max_new_tokens if limit is None else limit - len(ids)
    draw, calls = Sampler(sampling, context=ids), cached.calls

    def read(tokens: Sequence[int]) -> "Tensor":
        nonlocal calls
        if cached.calls != calls:
            raise InputError(
                "another text has used this CachedModel since this one's last piece: end one before the next begins, "
                "or make a CachedModel for each"
            )
        calls += 1
        return cached.read(tokens)[:known].cpu()

    ends = end_ids(cached.model, tokenizer, sampling.stop)
    at_most = min(sampling.max_new_tokens, room)
    for token in new_tokens(read, ids[statistics.reused_tokens :], draw, at_most=at_most, ends=ends):
        now = time.perf_counter()
        if statistics.new_tokens == 0:
            statistics.prefill_seconds = now - began
        statistics.decode_seconds = now - began - statistics.prefill_seconds
        statistics.new_tokens += 1
        yield token
    if statistics.new_tokens == 0:
        statistics.prefill_seconds = time.perf_counter() - began
    if statistics.new_tokens < at_most:
        statistics.finish = "end"
    else:
        statistics.finish = "length" if at_most == sampling.max_new_tokens else "context"
