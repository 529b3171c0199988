"""Hidden states between two blocks, in memory up to a budget and in files beyond it."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor


class ActivationStore:
    """A list of tensors, written once each in order and read as often as wanted.

    Args:
        budget: bytes to keep in memory; what exceeds them goes to files in a folder of its own.
        directory: where that folder is made; None: the system's temporary folder.
    """

    def __init__(self, budget: float, directory: str | Path | None = None) -> None:
        self._budget, self._directory = budget, directory
        self._entries: list[Tensor | tuple[Path, torch.Size, torch.dtype, torch.device]] = []
        self._in_memory = 0
        self._folder: Path | None = None

    def append(self, tensor: Tensor) -> None:
        """Keep ``tensor``."""
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        if self._in_memory + size <= self._budget:
            self._in_memory += size
            self._entries.append(tensor)
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="bitnet-activations-", dir=self._directory))
        path = self._folder / f"{len(self._entries)}.bin"
        tensor.cpu().contiguous().view(torch.uint8).numpy().tofile(path)
        self._entries.append((path, tensor.shape, tensor.dtype, tensor.device))

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Tensor]:
        for entry in self._entries:
            if isinstance(entry, Tensor):
                yield entry
            else:
                path, shape, dtype, device = entry
                values = torch.from_file(str(path), shared=False, size=shape.numel(), dtype=dtype)
                yield values.reshape(shape).to(device)

    @property
    def spilled(self) -> int:
        """How many of the tensors are in files."""
        return sum(not isinstance(entry, Tensor) for entry in self._entries)

    def close(self) -> None:
        """Forget the tensors and remove the files."""
        self._entries.clear()
        self._in_memory = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
