"""How the next token is chosen from the logits."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from bitnet.errors import InputError
from bitnet.generation.options import Sampling

CANDIDATES = 256  # most likely tokens that top-p looks at first: sorting 128,000 takes longer than a layer
COLDEST = 1e-6  # a smaller temperature draws the same tokens, and would be 0 in float32


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
