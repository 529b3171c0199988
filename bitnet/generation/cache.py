"""A model that remembers the keys and values of what it has read, so that a token costs one token's work."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bitnet.generation.step import OneToken, knows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST = 64  # tokens that a layer's memory starts with


class GrowingLayer(DynamicLayer):
    """Keys and values in memory that doubles when it is full.

    transformers' own layer copies all of it for every token: at 1,000 tokens of context 74 MB a step in a 125M model.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room_for_keys = self._room_for_values = key_states.new_empty(0)
        begin = self.get_seq_length()
        self._room_for_keys, self.keys = _appended(self._room_for_keys, begin, key_states)
        self._room_for_values, self.values = _appended(self._room_for_values, begin, value_states)
        return self.keys, self.values


def _appended(room: Tensor, begin: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """``room`` (a larger one, where it is full), and a view of its first ``begin`` tokens and ``states``."""
    end = begin + states.shape[-2]
    if room.numel() == 0 or room.shape[-2] < end:
        larger = states.new_empty((*states.shape[:-2], max(SMALLEST, end, 2 * begin), states.shape[-1]))
        if begin:
            larger[..., :begin, :] = room[..., :begin, :]
        room = larger
    room[..., begin:end, :] = states
    return room, room[..., :end, :]


class CachedModel:
    """``read(ids)`` appends to what was read and answers with the logits of the next token.

    Args:
        model: transformers' causal language model. It is called as it is: put it into evaluation mode first.

    Attributes:
        ids: what was read so far.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model, self.ids = model, list[int]()
        self._cache = _cache_for(model)
        own_memory = all(type(layer) is GrowingLayer for layer in self._cache.layers)
        self._step = OneToken(model) if own_memory and knows(model) else None
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Logits [vocabulary] of the token after ``ids``, which follow those of the calls before; at least one."""
        given = torch.tensor([list(ids)], device=self.model.device)
        try:
            logits = self._logits(given)
        except BaseException:  # Ctrl-C, too: some layers have the new tokens and some have not
            self._cache, self.ids = _cache_for(self.model), []
            raise
        self.ids.extend(ids)
        return logits[0, -1]

    def _logits(self, ids: Tensor) -> Tensor:
        if self._step is not None and ids.shape[1] == 1 and self._cache.get_seq_length():
            return self._step(ids, self._cache)
        return self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._last_only).logits

    def keep(self, ids: Sequence[int]) -> int:
        """Forget all that is not a beginning of ``ids``; return how many of them need not be read again.

        At least one always does, as its logits are wanted.
        """
        same = 0
        for old, new in zip(self.ids, ids[:-1], strict=False):
            if old != new:
                break
            same += 1
        excess = len(self.ids) - same
        if excess and all(isinstance(layer, GrowingLayer) for layer in self._cache.layers):
            self._cache.crop(-excess)
        elif excess:  # a sliding window has dropped what would be needed now
            self._cache, same = _cache_for(self.model), 0
        del self.ids[same:]
        return same


def _cache_for(model: "PreTrainedModel") -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
