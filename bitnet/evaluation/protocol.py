"""The protocols that a configuration chooses from (conf/evaluation): what text, in which windows, beside what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.evaluation.text import TextEvaluation, evaluate_text


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksProtocol:
    """The data module's packed validation blocks, as during training: quick, and comparable with its curves."""

    tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", _names(self.tasks))

    def protocol(self) -> dict[str, Any]:
        """For a record; blocks and their number are in its ``data``."""
        return {"text": "packed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextProtocol:
    """A whole split as one text, in windows: the protocol of published perplexities. See `bitnet.evaluation.text`.

    Attributes:
        split: validation or test.
        window: tokens in a window; None for the data's block size.
        stride: tokens from one window to the next; None for the window: no overlap.
        batch_size: windows in a forward pass.
        max_tokens: read only so many tokens; None reads the whole split.
        bootstrap: draws for the 95 % intervals; None computes none.
        compare: also the divergence from the full-precision model, which is run beside the quantized one.
        tasks: names of lm-eval tasks to run as well.

    Raises:
        InputError: an option that is out of range.
    """

    split: Literal["validation", "test"] = "validation"
    window: int | None = None
    stride: int | None = None
    batch_size: int = 8
    max_tokens: int | None = None
    bootstrap: int | None = 2000
    compare: bool = True
    tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", _names(self.tasks))
        if self.split not in ("validation", "test"):
            raise InputError(f"evaluation.split must be validation or test, got {self.split!r}")
        for name, least in (("window", 2), ("stride", 1), ("batch_size", 1), ("max_tokens", 2), ("bootstrap", 40)):
            value = getattr(self, name)
            if (value is None and name == "batch_size") or (value is not None and not _at_least(value, least)):
                raise InputError(f"evaluation.{name} must be a whole number of at least {least}, got {value!r}")
        if not isinstance(self.compare, bool):
            raise InputError(f"evaluation.compare must be true or false, got {self.compare!r}")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise InputError(
                f"evaluation.stride={self.stride} exceeds evaluation.window={self.window}: text would be lost"
            )

    def evaluate(
        self,
        model: nn.Module,
        ids: Tensor,
        *,
        block_size: int,
        reference: nn.Module | None = None,
        bytes_per_token: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> TextEvaluation:
        """`evaluate_text` with these options; ``reference`` is left out where ``compare`` is off."""
        return evaluate_text(
            model,
            ids,
            window=self.window or block_size,
            stride=self.stride,
            batch_size=self.batch_size,
            reference=reference if self.compare else None,
            max_tokens=self.max_tokens,
            bytes_per_token=bytes_per_token,
            progress=progress,
        )


def _at_least(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _names(tasks: Any) -> tuple[str, ...]:
    if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks or ()):
        raise InputError(f"evaluation.tasks must be a list of names, [arc_easy,piqa], got {tasks!r}")
    return tuple(tasks or ())
