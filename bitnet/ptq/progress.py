"""How far a quantization has come: a bar on a terminal, one plain line a block on a pipe."""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar


class Progress(Protocol):
    """What the driver tells of its work."""

    def begin(self, blocks: int) -> None:
        """So many blocks are to be quantized."""
        ...

    def layer(self, name: str, error: float | None) -> None:
        """A layer is done; its relative error where it is known."""
        ...

    def block(self, number: int, resumed: bool = False) -> None:
        """So many blocks are done; ``resumed`` where the last came from an earlier start."""
        ...

    def end(self) -> None:
        """Everything is done, or failed."""
        ...


class Silent:
    """Tells nothing."""

    def begin(self, blocks: int) -> None: ...

    def layer(self, name: str, error: float | None) -> None: ...

    def block(self, number: int, resumed: bool = False) -> None: ...

    def end(self) -> None: ...


class ConsoleProgress:
    """Shows blocks done, the last layer's relative error, and the time left.

    Args:
        console: where to write; None: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._bar: Bar | None = None

    def begin(self, blocks: int) -> None:
        self._began, self._blocks, self._done, self._resumed = time.perf_counter(), blocks, 0, 0
        self._errors: list[float] = []
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("quantizing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
                console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=blocks, figures="")
            self._bar.start()

    def layer(self, name: str, error: float | None) -> None:
        if error is not None:
            self._errors.append(error)
        if self._bar is not None:
            text = name if error is None else f"{name}  error {error:.2e}"
            self._bar.update(self._task, figures=f"{text}  {self._left()}")

    def block(self, number: int, resumed: bool = False) -> None:
        self._done, self._resumed = number, self._resumed + resumed
        if self._bar is not None:
            self._bar.update(self._task, completed=number)
            return
        errors = f"  mean error {sum(self._errors) / len(self._errors):.2e}" if self._errors else ""
        how = "  taken from the earlier start" if resumed else errors
        self._console.print(f"block {number}/{self._blocks}{how}  {self._left()}", markup=False)
        self._errors.clear()

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self) -> str:
        elapsed, own = time.perf_counter() - self._began, self._done - self._resumed
        if own <= 0:
            return f"{elapsed:.0f} s"
        return f"{elapsed:.0f} s, about {elapsed / own * (self._blocks - self._done):.0f} s left"
