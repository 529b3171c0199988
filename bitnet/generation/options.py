"""What decides a text besides the model and the prompt; needs no torch, so that a help page is there at once."""

import math
from dataclasses import dataclass
from numbers import Integral

from bitnet.errors import InputError


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
