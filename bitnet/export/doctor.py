"""Which formats a model fits, why not the others, and what would make it fit: before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitnet.export.writing import exporter

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn
    from transformers import PreTrainedTokenizerBase

TARGETS: tuple[tuple[str, dict[str, str]], ...] = (
    ("packed", {"layout": "i2"}),
    ("packed", {"layout": "t5"}),
    ("hf", {"weights": "latent"}),
    ("hf", {"weights": "bitlinear"}),
    ("hf", {"weights": "autobitlinear"}),
    ("hf", {"weights": "dequantized"}),
    ("gguf", {"type": "TQ2_0"}),
    ("gguf", {"type": "TQ1_0"}),
    ("gguf", {"type": "Q2_0"}),
    ("gguf", {"type": "I2_S"}),
    ("gguf", {"type": "auto"}),
    ("gptq", {}),
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One target: ``problems`` is empty where the model fits."""

    format: str
    options: dict[str, str]
    problems: tuple[str, ...]

    @property
    def command(self) -> str:
        """What to add to ``python -m bitnet.export PATH``."""
        return " ".join([f"--to {self.format}", *(f"--{key} {value}" for key, value in self.options.items())])


def diagnose(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    targets: Sequence[tuple[str, dict[str, str]]] = TARGETS,
) -> list[Diagnosis]:
    """Ask every target about ``model`` and ``tokenizer``. Looks at types, shapes and settings only."""
    return [
        Diagnosis(format, options, tuple(exporter(format, **options).problems(model, tokenizer)))
        for format, options in targets
    ]


def diagnosis_table(found: Sequence[Diagnosis], title: str) -> "Table":
    """The table that ``--check`` prints."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_lines=True)
    for heading in ("target", "fits", "why not, and what would make it fit"):
        table.add_column(heading, overflow="fold")
    for each in found:
        table.add_row(each.command, "no" if each.problems else "yes", "\n".join(each.problems))
    return table
