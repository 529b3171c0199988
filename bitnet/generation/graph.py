"""One token's step as a recording: a CUDA graph, whose hundreds of kernels a GPU gets in one call.

A step launches some ten kernels a layer, and each launch costs the CPU several microseconds: for a small model more
than a GPU needs to run them. A recording holds the kernels with the addresses that they work on, and no Python. So all
that changes from token to token is a number in memory that stays in its place: the id, and its position, which decides
where keys and values are written and how far attention sees. It sees a layer's whole memory, under a mask; when that
memory has doubled (after 64, 128, 256 ... tokens), the step is recorded again.

A recording is anything that runs a function again on the same memory (`Recorder`): a test follows it on a CPU.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitnet.generation.step import OneToken, knows
from bitnet.ops.cuda import weights_used

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

FIXED_ROTARY = {"default", "linear", "llama3", "yarn"}  # others change with the length of the text

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]
"""Runs a function, and runs it once more to record it; gives its answer's memory, and what writes that anew."""


def graph_problem(model: "PreTrainedModel") -> str | None:
    """Why the steps of ``model`` cannot be replayed from a CUDA graph, None where they can."""
    places = sorted({str(each.device) for each in (*model.parameters(), *model.buffers())})
    if len(places) != 1 or not places[0].startswith("cuda"):
        return f"the model is on {', '.join(places)}, and not on one CUDA device"
    if not knows(model):
        return f"this package has no step of its own for {type(model).__name__} as it is: hooks, attention, its parts"
    body: Any = model.model
    rotary = getattr(body.rotary_emb, "rope_type", "unknown")
    if rotary not in FIXED_ROTARY:
        return f"its rotary embedding ({rotary}) changes with the length of the text"
    return None


class RecordedStep:
    """`OneToken`, replayed: the same operators on the same values, but for attention, whose sums the mask may reorder.

    Everything that the recording reads is kept as long as it is, so that a model that is changed or moved answers as
    it was, like `OneToken`'s, until `CachedModel` notices.

    Args:
        model: of a body that `bitnet.generation.step.knows` knows.
        recorder: `cuda_graph` of the model's device.
        required: whether a recording that fails is an error; else a warning says so once, and each step is launched.

    Attributes:
        recordings: made so far.
        problem: why steps are not replayed; None where they are.
    """

    def __init__(self, model: "PreTrainedModel", recorder: Recorder, *, required: bool = False) -> None:
        self._step, self._recorder, self._required = OneToken(model, recorded=True), recorder, required
        self._read = [each.detach() for each in (*model.parameters(), *model.buffers())]
        self._rooms: list[tuple[Tensor, Tensor]] = []
        self._replay: Callable[[], object] | None = None
        self.recordings, self.problem = 0, None

    def __call__(self, ids: Tensor, cache: "DynamicCache") -> Tensor:
        """Logits [1, 1, vocabulary] for ids [1, 1]; every layer of ``cache`` is a `GrowingLayer`.

        Raises:
            RuntimeError: the recording failed, and is required.
        """
        if self.problem is not None or torch.is_autocast_enabled(ids.device.type):  # which changes dtypes
            return self._step(ids, cache)
        position = cache.get_seq_length()
        layers: list[Any] = cache.layers
        rooms = [layer.extend() for layer in layers]
        if self._replay is None or any(new[0] is not old[0] for new, old in zip(rooms, self._rooms, strict=True)):
            try:
                self._record(ids, position, rooms)
            except RuntimeError as error:
                if self._required:
                    raise
                self._give_up(error)
                cache.crop(-1)
                return self._step(ids, cache)
        self._ids.copy_(ids)
        self._position.fill_(position)
        assert self._replay is not None
        self._replay()
        return self._logits.clone()  # the next replay writes there

    def _record(self, ids: Tensor, position: int, rooms: list[tuple[Tensor, Tensor]]) -> None:
        self._replay, self._rooms = None, rooms  # the old recording's memory goes first
        self._ids, self._position = ids.clone(), torch.full_like(ids[0], position)
        place, number = self._position, torch.arange(rooms[0][0].shape[-2], device=ids.device)
        memories = [_Memory(keys, values, place) for keys, values in rooms]

        def step() -> Tensor:
            return self._step.run(self._ids, place[None], memories, (number <= place)[None, None, None])

        with weights_used() as self._weights:
            self._logits, self._replay = self._recorder(step)
        self.recordings += 1

    def _give_up(self, error: RuntimeError) -> None:
        self._replay, self._rooms = None, []
        self.problem = str(error)
        warnings.warn(
            f"tokens are computed without a CUDA graph, whose recording failed: {error}", RuntimeWarning, stacklevel=2
        )


class _Memory:
    """All keys and values that a layer has room for, written at a place that is a number on the device."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        self._keys, self._values, self._place = keys, values, place

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._keys.index_copy_(-2, self._place, keys)
        self._values.index_copy_(-2, self._place, values)
        return self._keys, self._values


def cuda_graph(device: torch.device) -> Recorder:
    """Records CUDA graphs on ``device``. The first run does what waits for the device."""

    def record(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        with torch.cuda.device(device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):  # libraries choose their workspace for a stream when it is first used
                run()
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                answer = run()
        return answer, graph.replay

    return record
