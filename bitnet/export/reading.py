"""What `load` gives, whichever format it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model read from disk.

    Attributes:
        model: transformers' body in evaluation mode; its quantized linears are `QuantizedLinear` or `PackedLinear`.
        tokenizer: the one that was stored with it, if any.
        path: where it was read.
        format: for example "packed", "hf bitlinear", "gguf TQ2_0".
        record: the run that made it, where the format keeps it.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    path: Path
    format: str
    record: Mapping[str, Any] = field(default_factory=dict)
