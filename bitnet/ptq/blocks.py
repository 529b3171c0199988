"""The parts of a causal language model that the driver goes through: blocks, their linears, and which share an input.

Nothing here knows a model by name. The blocks are the list of modules with the most linear layers in it; the linears
that share an input are found by watching one forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.nn.linears import is_linear

Hook = Callable[[str, Tensor], None]


class Reached(Exception):
    """Raised inside a forward pass to end it where nothing further is needed."""


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The name of the list of the model's blocks, and the blocks.

    Raises:
        InputError: no list of modules with linear layers.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    counted = [(sum(map(is_linear, module.modules())), -name.count("."), name) for name, module in lists]
    if not counted or max(counted)[0] == 0:
        raise InputError(
            f"{type(model).__name__} has no list of blocks with linear layers (nn.Linear or Conv1D) to quantize"
        )
    name = max(counted)[-1]
    return name, list(dict(lists)[name])


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of ``block`` by their names in it, in order."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def head_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The name of the model's output head, and the head.

    Raises:
        InputError: the model has none that is a linear layer.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    for name, module in model.named_modules():
        if module is head and is_linear(module):
            return name, module
    raise InputError(f"{type(model).__name__} has no output head that is a linear layer: leave out driver.head")


def embedding_of(model: nn.Module) -> tuple[str, nn.Embedding]:
    """The name of the model's input embedding, and the embedding.

    Raises:
        InputError: it is no plain ``nn.Embedding`` (Gemma's multiplies what it looks up).
    """
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding = get_embedding() if get_embedding is not None else None
    for name, module in model.named_modules():
        if module is embedding and type(module) is nn.Embedding:
            return name, module
    raise InputError(
        f"the input embedding is no plain nn.Embedding, got {type(embedding).__name__}: leave out embeddings"
    )


@contextmanager
def watched(block: nn.Module, names: Sequence[str], hook: Hook, *, stop: bool = False) -> Iterator[None]:
    """Call ``hook(name, input)`` whenever one of the layers ``names`` of ``block`` is reached.

    ``stop`` ends the forward pass by `Reached` once each of them was.
    """
    missing = set(names)

    def on_reach(name: str) -> Callable[..., None]:
        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            hook(name, arguments[0])
            missing.discard(name)
            if stop and not missing:
                missing.update(names)
                raise Reached

        return before

    handles = [block.get_submodule(name).register_forward_pre_hook(on_reach(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sharing_an_input(block: nn.Module, names: Sequence[str], forward: Callable[[], Any]) -> list[list[str]]:
    """``names`` in the order in which ``forward()`` reaches them, those that read the very same tensor together.

    Layers that are not reached are left out.
    """
    reached: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        reached.setdefault(name, x)

    with watched(block, names, note), torch.no_grad():
        forward()
    stages: list[list[str]] = []
    for name, x in reached.items():
        if stages and reached[stages[-1][0]] is x:
            stages[-1].append(name)
        else:
            stages.append([name])
    return stages


def until_reached(forward: Callable[[], object]) -> None:
    """Call ``forward``; a hook may end it by `Reached`."""
    with suppress(Reached):
        forward()
