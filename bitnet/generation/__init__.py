"""Text from a causal language model, token by token, with a cache of keys and values.

The names below are loaded when they are first used: a command line's help page needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet.generation.cache import CachedModel
    from bitnet.generation.options import Sampling
    from bitnet.generation.prompt import chat_ids, prompt_ids
    from bitnet.generation.sampling import Sampler
    from bitnet.generation.streaming import Completion, Statistics, TextStream, complete, stream
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

_HOMES = {
    "CachedModel": "cache",
    "Detokenizer": "text",
    "Sampler": "sampling",
    "Sampling": "options",
    "StopFilter": "text",
    "chat_ids": "prompt",
    "new_tokens": "tokens",
    "prompt_ids": "prompt",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bitnet.generation' has no attribute {name!r}: it offers {', '.join(__all__)}")
    return getattr(import_module(f"bitnet.generation.{_HOMES.get(name, 'streaming')}"), name)
