"""What an exporter is: something that writes a model for another program, and reads back what it wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from bitnet.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ExportError(RuntimeError):
    """What was written does not read back as the model: a fault of the exporter or of the library that reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What one export wrote and how near it is to the model; every file was read back before it got its name.

    Attributes:
        path: the folder or file.
        format: for example "packed" or "gguf TQ2_0".
        contents: what it holds, in words.
        bytes: of all its files.
        layers: quantized layers whose codes and scales were read back and are equal. 0 where values stand for codes.
        difference: root mean square difference of the logits of the model read back from those of the model that was
            exported, as a share of their spread over the vocabulary. 0.0 is bit-equality.
        runtime: the program that read it ("transformers 5.23.0"), or None where only this package did.
        runtime_difference: the same measure for the logits that ``runtime`` computed.
    """

    path: Path
    format: str
    contents: str
    bytes: int
    layers: int
    difference: float
    runtime: str | None = None
    runtime_difference: float | None = None


class Exporter(Protocol):
    """One format. Its options are constructor arguments, so that a yaml can name it."""

    @property
    def filename(self) -> str:
        """What it is called in a run's folder: "packed", "hf", "model-TQ2_0.gguf"."""
        ...

    def problems(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[str]:
        """Why the format cannot carry ``model`` and ``tokenizer``, each with what would make it fit; empty if it can.

        Looks at types, shapes and settings only: no work, no memory.
        """
        ...

    def write(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase | None",
        path: str | Path,
        record: Mapping[str, Any] | None = None,
    ) -> Exported:
        """Write ``path``, whole or not at all, after reading it back. ``model`` stays as it is.

        Args:
            model: a causal language model whose linears are dense, trained quantized or frozen.
            tokenizer: goes with it where there is one.
            path: a new folder, or a new file where the format is one.
            record: the run that made the model (`bitnet.report.RunRecord` as a dict): its figures go into the model
                card, its command and versions into the provenance.

        Raises:
            InputError: ``path`` exists, or the format cannot carry the model (NaN in a weight, say).
            ExportError: what was written does not give the model back. Nothing is left behind.
        """
        ...


def refuse_problems(problems: list[str], format: str) -> None:
    """Raise InputError with every reason why a model does not fit, where there are any."""
    if problems:
        raise InputError(f"{format} cannot carry this model: " + "; ".join(problems))
