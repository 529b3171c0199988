"""What an exporter is: something that writes a model and its tokenizer to a folder that another program reads."""

from pathlib import Path
from typing import Any, Protocol

from torch import nn


class ExportError(RuntimeError):
    """What was written does not read back as the model: a fault of the exporter or of the library that reads it."""


class Exporter(Protocol):
    """One format. Its options are constructor arguments, so that a yaml can name it."""

    def write(self, model: nn.Module, tokenizer: Any, directory: str | Path) -> Path:
        """Write a new folder, whole or not at all, after reading it back, and return its path.

        Raises:
            InputError: ``directory`` exists, or the model cannot be written (NaN in a weight, say).
            ExportError: the folder does not give the model back.
        """
        ...
