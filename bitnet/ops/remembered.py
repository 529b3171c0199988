"""What was found out about a tensor, kept as long as the tensor lives and is not changed."""

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Remembered(Generic[T]):
    """Values by tensor.

    A tensor is the same while it is the same object with the same memory and PyTorch's counter of in-place changes
    stands still. Writing through ``tensor.data`` or a pointer moves no counter.

    Args:
        uncounted: whether to remember tensors that have no such counter, which inference mode makes.
    """

    def __init__(self, *, uncounted: bool) -> None:
        self._uncounted = uncounted
        self._values: dict[int, tuple[weakref.ref[Tensor], Hashable, T]] = {}

    def get(self, tensor: Tensor, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``tensor`` and ``key``, made where it is not known."""
        counted = not tensor.is_inference()
        if not counted and not self._uncounted:
            return make()
        state = (tensor.data_ptr(), tensor._version if counted else None, key)
        known = self._values.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == state:
            return known[2]
        value = make()
        name, values = id(tensor), self._values

        def forget(gone: weakref.ref[Tensor]) -> None:
            if name in values and values[name][0] is gone:
                del values[name]

        values[name] = (weakref.ref(tensor, forget), state, value)
        return value

    def __len__(self) -> int:
        return len(self._values)
