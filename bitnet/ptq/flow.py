"""The calibration text on its way through the blocks of a model, one block at a time.

The model's own forward pass prepares what a block gets (masks, positions, rotary tables): one pass for each shape of
batch records it, and the blocks are then called with it directly.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.ptq.activations import ActivationStore
from bitnet.ptq.blocks import Reached

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Flow:
    """Hidden states at the entrance of the current block: those of the quantized model and, where asked for, also those
    of the full-precision model.

    Args:
        model: called as ``model(input_ids, use_cache=False)``.
        blocks: of the model, in order.
        calibration: token ids [windows, window]; None: there is no text, and nothing flows.
        batch_size: windows in a batch.
        memory_budget: bytes of hidden states in memory.
        full_precision: carry the full-precision model's hidden states along.
        directory: where hidden states beyond the budget go; None: the system's temporary folder.

    Raises:
        InputError: ids outside the vocabulary, or a model whose blocks need more than hidden states [batch, time,
            features] and what depends on their shape (Gemma 3n and 4 give every block inputs that depend on the text).
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        calibration: Int64[Tensor, "windows window"] | None,
        *,
        batch_size: int,
        memory_budget: float,
        full_precision: bool = False,
        directory: Path | None = None,
    ) -> None:
        self.full_precision = full_precision and calibration is not None
        self._budget = memory_budget / (4 if self.full_precision else 2)  # a block's inputs and its outputs
        self._directory = directory
        self._states = self._original_states = ActivationStore(self._budget, directory)
        self._arguments: list[dict[torch.Size, Arguments]] = [{} for _ in blocks]
        if calibration is None:
            return
        device = next(model.parameters()).device
        batches = [batch.to(device) for batch in calibration.split(batch_size)]
        _check_ids(model, calibration)
        for batch in {batch.shape: batch for batch in batches}.values():
            self._arguments = _recorded(model, blocks, batch, self._arguments)
        again = _recorded(model, blocks, batches[0].flip(0, 1), [{} for _ in blocks])  # another text of that shape
        if not _same(again, [{batches[0].shape: each[batches[0].shape]} for each in self._arguments]):
            raise InputError(
                f"the blocks of {type(model).__name__} get inputs beside the hidden states that depend on the text: "
                "this driver cannot calibrate them"
            )
        for batch in batches:
            self._states.append(_entrance(model, blocks[0], batch))

    def __len__(self) -> int:
        return len(self._states)

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every batch the hidden states at the entrance: the quantized model's, the full-precision model's."""
        yield from zip(self._states, self._original_states, strict=True)

    def call(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """What ``block``, the one number ``index``, makes of ``hidden``."""
        positional, named = self._arguments[index][hidden.shape[:2]]
        output = block(hidden, *positional, **named)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, index: int, block: nn.Module, original: nn.Module | None) -> None:
        """Go on to the entrance of the next block; ``original`` is the block as it was, for the full-precision flow."""
        states = self._next(index, block, self._states)
        if original is None:
            self._replace(states, states)
        else:
            self._replace(states, self._next(index, original, self._original_states))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._states.close()
        self._original_states.close()

    def _next(self, index: int, block: nn.Module, states: ActivationStore) -> ActivationStore:
        following = ActivationStore(self._budget, self._directory)
        try:
            for hidden in states:
                following.append(self.call(index, block, hidden))
        except BaseException:
            following.close()
            raise
        return following

    def _replace(self, states: ActivationStore, original_states: ActivationStore) -> None:
        self._states.close()
        self._original_states.close()
        self._states, self._original_states = states, original_states


def _recorded(
    model: nn.Module, blocks: list[nn.Module], batch: Tensor, found: list[dict[torch.Size, Arguments]]
) -> list[dict[torch.Size, Arguments]]:
    """``found``, and what every block is called with beside the hidden states for batches of this shape."""
    found = [dict(each) for each in found]

    def keep(index: int) -> Callable[..., None]:
        def before(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = positional[0] if positional else named["hidden_states"]
            if hidden.dim() != 3 or hidden.shape[:2] != batch.shape:
                raise InputError(
                    f"the blocks of {type(model).__name__} take hidden states {list(hidden.shape)} for ids "
                    f"{list(batch.shape)}: this driver calibrates blocks of [batch, time, features]"
                )
            rest = {name: value for name, value in named.items() if name != "hidden_states"}
            found[index][batch.shape] = positional[1:], rest
            if index == len(blocks) - 1:
                raise Reached

        return before

    handles = [block.register_forward_pre_hook(keep(index), with_kwargs=True) for index, block in enumerate(blocks)]
    try:
        with suppress(Reached):
            model(batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two structures hold equal tensors and the same of everything else that can be compared."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)


def _check_ids(model: nn.Module, ids: Tensor) -> None:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    entries = getattr(embedding, "num_embeddings", None)
    if entries is not None and not (int(ids.min()) >= 0 and int(ids.max()) < entries):
        raise InputError(
            f"calibration holds token ids from {int(ids.min())} to {int(ids.max())}, and the model has {entries} "
            "embeddings: tokenize with the model's own tokenizer"
        )
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and ids.shape[1] > longest:
        raise InputError(
            f"calibration windows have {ids.shape[1]} tokens, and the model takes {longest}: lower calibration.window"
        )


def _entrance(model: nn.Module, first: nn.Module, batch: Tensor) -> Tensor:
    """The hidden states that ``batch`` enters the first block with."""
    found: list[Tensor] = []

    def stop(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(positional[0] if positional else named["hidden_states"])
        raise Reached

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(batch, use_cache=False)
    except Reached:
        pass
    finally:
        handle.remove()
    return found[0]
