"""A model that remembers the keys and values of what it has read, so that a token costs one token's work."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bitnet.errors import InputError
from bitnet.generation.graph import RecordedStep, cuda_graph, graph_problem
from bitnet.generation.native import NativeStep, native_step
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

    def extend(self) -> tuple[Tensor, Tensor]:
        """All of the memory of keys and of values, a token more of which counts as read: the caller's to write."""
        assert self.keys is not None
        assert self.values is not None
        begin = self.get_seq_length()
        self._room_for_keys = _room(self._room_for_keys, begin, begin + 1, self.keys)
        self._room_for_values = _room(self._room_for_values, begin, begin + 1, self.values)
        self.keys = self._room_for_keys.narrow(-2, 0, begin + 1)
        self.values = self._room_for_values.narrow(-2, 0, begin + 1)
        return self._room_for_keys, self._room_for_values


def _room(room: Tensor, begin: int, end: int, like: Tensor) -> Tensor:
    """``room``, or where it has none for ``end`` tokens a larger one with its first ``begin``."""
    if room.numel() and room.shape[-2] >= end:
        return room
    # Zeros: a step that sees all of it, under a mask, multiplies what is not written yet by 0, and 0 * NaN is NaN.
    larger = like.new_zeros((*like.shape[:-2], max(SMALLEST, end, 2 * begin), like.shape[-1]))
    if begin:
        larger[..., :begin, :] = room[..., :begin, :]
    return larger


def _appended(room: Tensor, begin: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """``room`` (a larger one, where it is full), and a view of its first ``begin`` tokens and ``states``."""
    end = begin + states.shape[-2]
    room = _room(room, begin, end, states)
    room[..., begin:end, :] = states
    return room, room[..., :end, :]


class CachedModel:
    """``read(ids)`` appends to what was read and answers with the logits of the next token.

    The model may change (``load_state_dict``, training, other modules): `keep`, and `read` of several tokens or of the
    first, notice it, and all is read again by the model as it is then. A change between two single tokens goes
    unnoticed until then, as does one to a weight's memory that PyTorch does not count (``.data``, NumPy).

    Args:
        model: transformers' causal language model. It is called as it is: put it into evaluation mode first.
        graph: replay the step of one token from a CUDA graph; None: where the model is on a GPU and can be replayed.

    Attributes:
        ids: what was read so far.
        calls: of `read` and `keep`, so far; who counts its own knows whether another has come between.

    Raises:
        InputError: a graph is asked for, and the model cannot be replayed.
    """

    def __init__(self, model: "PreTrainedModel", *, graph: bool | None = None) -> None:
        self.model, self.calls, self._graph = model, 0, graph
        self._begin()
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )

    def _begin(self) -> None:
        """Forget all; take the model as it is now."""
        self.ids = list[int]()
        self._cache = _cache_for(self.model)
        own_memory = all(type(layer) is GrowingLayer for layer in self._cache.layers)
        with torch.inference_mode(False), torch.no_grad():  # the model's bytes move: to tensors that can be loaded into
            self._step = _step_of(self.model, self._graph) if own_memory and knows(self.model) else None
        if self._graph and not isinstance(self._step, RecordedStep):
            raise InputError(
                f"a CUDA graph needs a model whose steps can be replayed; here {graph_problem(self.model)}: move the "
                "model to a GPU, or do without a graph"
            )
        self._stamp = _stamp(self.model)

    @property
    def graphed(self) -> bool:
        """Whether the step of one token is replayed from a CUDA graph."""
        return isinstance(self._step, RecordedStep) and self._step.problem is None

    def read(self, ids: Sequence[int]) -> Tensor:
        """Logits [vocabulary] of the token after ``ids``, which follow those of the calls before; at least one."""
        self.calls += 1
        if (len(ids) > 1 or not self.ids) and self._stamp != _stamp(self.model):
            ids = [*self.ids, *ids]
            self._begin()
        return self._read(ids)

    @torch.inference_mode()
    def _read(self, ids: Sequence[int]) -> Tensor:
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

        At least one always does, as its logits are wanted; all do, where the model has changed.
        """
        self.calls += 1
        if self._stamp != _stamp(self.model):
            self._begin()
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


def _step_of(model: "PreTrainedModel", graph: bool | None) -> NativeStep | RecordedStep | OneToken:
    if graph is not False and graph_problem(model) is None:
        return RecordedStep(model, cuda_graph(model.device), required=graph is True)
    step = OneToken(model)
    return native_step(model, step) or step


def _stamp(model: nn.Module) -> list[int]:
    """Differs where modules, hooks, or weights were replaced or written to: 0.4 ms for 12 layers.

    Buffers that are in no checkpoint are left out: a rotary embedding replaces its own as the text grows.
    """
    found = list[int]()
    for module in model.modules():
        found += [id(module), len(module._forward_hooks) + len(module._forward_pre_hooks)]
        stored = [each for name, each in module._buffers.items() if name not in module._non_persistent_buffers_set]
        for tensor in (*module._parameters.values(), *stored):
            if tensor is not None:
                found += [tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version]  # which counts no writes
    return found


def _cache_for(model: "PreTrainedModel") -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
