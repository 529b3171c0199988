"""How the next token is chosen from the logits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from bitnet.errors import InputError

CANDIDATES = 256  # most likely tokens that top-p looks at first: sorting 128,000 takes longer than a layer
COLDEST = 1e-6  # a smaller temperature draws the same tokens, and would be 0 in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What decides a text besides the model and the prompt.

    The logits are changed in this order: repetition penalty, temperature, top-k, top-p (of what top-k left).

    Attributes:
        max_new_tokens: tokens that are generated, at most.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: draw from so many of the most likely tokens; 0 from all.
        top_p: draw from the fewest tokens whose probabilities sum to at least this.
        repetition_penalty: positive logits of tokens that occurred, prompt included, are divided by it, negative ones
            multiplied (arXiv:1909.05858, section 4.1); 1 changes nothing.
        seed: of the drawing. The same seed gives the same text.
        stop: texts that end the generation; they are not part of the result.

    Raises:
        InputError: a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise InputError(f"{name} must be a whole number, got {value!r}")
        for name, fits, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (the most likely token) or above"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1: none)"),
            ("seed", 0 <= self.seed < 2**63, "0 or above, and below 2^63"),
            ("stop", "" not in self.stop, "texts that are not empty"),
        ):
            if not fits:
                raise InputError(f"{name} must be {expected}, got {getattr(self, name)!r}")


class Sampler:
    """Draws tokens; draws from ``generator`` alone, so that no other random number depends on it.

    Args:
        sampling: how.
        generator: on the device of the logits; None: a new one with ``sampling.seed``, on the CPU.
        context: ids that count as having occurred.
    """

    def __init__(
        self, sampling: Sampling, generator: torch.Generator | None = None, context: Iterable[int] = ()
    ) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed) if generator is None else generator
        self._occurred = list(dict.fromkeys(context))
        self._penalty: Tensor | None = None  # [vocabulary]: the penalty where a token has occurred, else 1

    def __call__(self, logits: Tensor) -> int:
        """The next token's id, given its logits [vocabulary] in any float dtype; arithmetic in float32.

        Raises:
            InputError: logits that are NaN or infinite.
        """
        logits = logits.float()
        if self._sampling.repetition_penalty != 1:
            logits = self._penalized(logits)
        best, token = logits.max(0)  # the maximum is NaN where any logit is
        if not math.isfinite(best.item()):
            raise InputError("the model's logits are not finite: its training diverged, or its weights are damaged")
        if self._sampling.temperature > 0:
            token = self._drawn(((logits - best) / max(self._sampling.temperature, COLDEST)).exp())
        chosen = int(token)
        if self._penalty is not None:
            self._penalty[chosen] = self._sampling.repetition_penalty
        return chosen

    def _penalized(self, logits: Tensor) -> Tensor:
        if self._penalty is None:
            self._penalty = torch.ones_like(logits)
            known = [
                each for each in self._occurred if 0 <= each < len(logits)
            ]  # a model can read more ids than it may say
            self._penalty[known] = self._sampling.repetition_penalty
        return torch.where(logits > 0, logits / self._penalty, logits * self._penalty)

    def _drawn(self, weights: Tensor) -> Tensor:
        """A place in ``weights``, which are in proportion to the probabilities."""
        ids: Tensor | None = None
        if 0 < self._sampling.top_k < len(weights):
            weights, ids = weights.topk(self._sampling.top_k)
        if self._sampling.top_p < 1:
            weights, nucleus = _nucleus(weights, self._sampling.top_p)
            ids = nucleus if ids is None else ids[nucleus]
        place = _inverse(weights, self._generator)
        return place if ids is None else ids[place]


def _nucleus(weights: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest largest weights that have the share ``top_p`` of all together, in falling order, and their places."""
    enough, number = weights.sum(dtype=torch.float64) * top_p, CANDIDATES
    while True:
        found, places = weights.topk(min(number, len(weights)))
        sums = found.cumsum(0, dtype=torch.float64)
        if number >= len(weights) or sums[-1] >= enough:
            keep = min(len(found), 1 + int((sums < enough).sum()))
            return found[:keep], places[:keep]
        number *= 8


def _inverse(weights: Tensor, generator: torch.Generator) -> Tensor:
    """A place drawn by the inverse of the distribution function: one random number, not one a token as in multinomial.

    The whole draw takes 0.16 ms for a vocabulary of 32,000, multinomial alone 0.68. Sums are float64: in float32 the
    tail would be lost.
    """
    sums = weights.cumsum(0, dtype=torch.float64)
    point = torch.rand((), dtype=torch.float64, device=weights.device, generator=generator) * sums[-1]
    return torch.searchsorted(sums, point, right=True).clamp(max=len(weights) - 1)  # right: never a weight of 0
