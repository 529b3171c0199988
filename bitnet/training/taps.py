"""Notes of what layers inside a model answer, for losses that compare more than its logits."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Taps:
    """Keeps the latest outputs of some modules: those of a forward pass of the whole model.

    A block that is checkpointed runs once more in the backward pass, and its layers' hooks with it: what they answer
    then is not kept, or it would hold a second graph.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._listening = False

    def attach(self, model: nn.Module, places: Mapping[str, nn.Module]) -> None:
        """Begin to note what ``places``, modules of ``model`` by a name, answer."""
        if not self._handles:
            self._handles = [module.register_forward_hook(self._keep(name)) for name, module in places.items()]
            self._handles.append(model.register_forward_pre_hook(self._listen))

    def detach(self) -> None:
        """End it: no hook stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def take(self) -> dict[str, Tensor]:
        """What was kept; it is let go here, or it would hold its graph until the next forward pass."""
        taken = dict(self._seen)
        self._seen.clear()
        self._listening = False
        return taken

    def _listen(self, module: nn.Module, arguments: Any) -> None:
        self._listening = True

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if self._listening:
                self._seen[name] = output[0] if isinstance(output, tuple) else output

        return hook
