"""What a model of the run is worth: the figures of its record, by the protocol that the configuration chooses."""

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from bitnet.data.datamodule import TextDataModule
from bitnet.errors import InputError
from bitnet.evaluation import BlocksProtocol, TextProtocol, evaluate_loss
from bitnet.evaluation.tasks import evaluate_tasks
from bitnet.report.loggers import require


@dataclass(slots=True)
class Measure:
    """Evaluates models on the run's data, all by one protocol; the text is read once."""

    protocol: BlocksProtocol | TextProtocol
    data: TextDataModule
    _ids: Tensor | None = field(default=None, init=False)
    _bytes_per_token: float | None = field(default=None, init=False)

    def prepare(self) -> None:
        """Read the text and look for lm-eval now: what cannot be used is refused before any long work.

        Raises:
            InputError: no text in the split, sizes that do not fit, lm-eval asked for and not installed.
        """
        if self.protocol.tasks:
            require("lm_eval", extra="eval")
        if isinstance(self.protocol, TextProtocol):
            self._text()
            window, stride = self.protocol.window or self.data.block_size, self.protocol.stride
            if stride is not None and stride > window:
                raise InputError(
                    f"evaluation.stride={stride} exceeds the window of {window} tokens: text would be lost"
                )

    def __call__(self, model: nn.Module, reference: nn.Module | None = None) -> list[dict[str, Any]]:
        """The record's fields for ``model`` and, in front of it, those for ``reference`` where one is given.

        Losses of both, the gap, and with ``compare`` the divergence from the reference come from one pass.
        """
        if isinstance(self.protocol, BlocksProtocol) or reference is None or not self.protocol.compare:
            return [self._alone(each) for each in (reference, model) if each is not None]
        found = self.protocol.evaluate(model, self._text(), reference=reference, **self._sizes)
        of_reference = found.of_reference
        assert of_reference is not None
        draws = self.protocol.bootstrap
        return [of_reference.figures(draws) | self._tasks(reference), found.figures(draws) | self._tasks(model)]

    def _alone(self, model: nn.Module) -> dict[str, Any]:
        if isinstance(self.protocol, TextProtocol):
            found = self.protocol.evaluate(model, self._text(), **self._sizes)
            return found.figures(self.protocol.bootstrap) | self._tasks(model)
        loss = evaluate_loss(model, self.data.whole("validation"), bytes_per_token=self.data.bytes_per_token)
        figures: dict[str, Any] = {name: getattr(loss, name) for name in ("nll", "perplexity", "bits_per_byte")}
        return figures | {"evaluation": self.protocol.protocol()} | self._tasks(model)

    def _text(self) -> Tensor:
        assert isinstance(self.protocol, TextProtocol)
        if self._ids is None:
            self._ids = self.data.joined(self.protocol.split, max_tokens=self.protocol.max_tokens)
        return self._ids

    @property
    def _sizes(self) -> dict[str, Any]:
        if self._bytes_per_token is None:
            text = self.data.tokenizer.decode(self._text(), skip_special_tokens=True)
            self._bytes_per_token = len(cast(str, text).encode()) / len(self._text())
        return {"block_size": self.data.block_size, "bytes_per_token": self._bytes_per_token}

    def _tasks(self, model: nn.Module) -> dict[str, Any]:
        if not self.protocol.tasks:
            return {}
        return {"tasks": evaluate_tasks(model, self.data.tokenizer, self.protocol.tasks)}
