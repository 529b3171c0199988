"""Text from a causal language model, token by token, with a cache of keys and values."""

from bitnet.generation.cache import CachedModel
from bitnet.generation.prompt import chat_ids, prompt_ids
from bitnet.generation.sampling import Sampler, Sampling
from bitnet.generation.stream import Completion, Statistics, TextStream, complete, stream
from bitnet.generation.text import Detokenizer, StopFilter
from bitnet.generation.tokens import new_tokens

__all__ = [
    "CachedModel",
    "Completion",
    "Detokenizer",
    "Sampler",
    "Sampling",
    "Statistics",
    "StopFilter",
    "TextStream",
    "chat_ids",
    "complete",
    "new_tokens",
    "prompt_ids",
    "stream",
]
