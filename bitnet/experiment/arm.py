"""One model of a run on its way to a record: where it is written, how it is measured, what it took so far."""

import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from bitnet.data.datamodule import TextDataModule
from bitnet.evaluation import TextProtocol, footprint
from bitnet.experiment.measure import Measure
from bitnet.experiment.settings import build_all, command, plain
from bitnet.export.protocol import refuse_problems
from bitnet.export.writing import describe
from bitnet.models.pretrained import from_directory, stored_dtype
from bitnet.report import RunRecord, git_state, machine
from bitnet.report.record import versions

RECORD = "run.json"
LATENT_RECORD = "latent.json"
REFERENCE_RECORD = "reference.json"
FULL_PRECISION = "full precision"  # the method of a pretrained model as it is


@dataclass(frozen=True, slots=True)
class Fit:
    """What training took."""

    steps: int
    tokens: int
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Started:
    """When a run began, and with which code: a process runs what it loaded, whatever happens to the files meanwhile."""

    clock: float
    date: str
    git_sha: str | None
    git_dirty: bool | None

    @classmethod
    def now(cls) -> Self:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(time.perf_counter(), date, *_code())


@dataclass(frozen=True, slots=True)
class Arm:
    """What all records of one model share."""

    cfg: DictConfig
    directory: Path
    data: TextDataModule
    measure: Measure
    fit: Fit
    started: Started

    def record(self, method: str, model: PreTrainedModel, figures: dict[str, Any], **more: Any) -> RunRecord:
        """A record of ``model`` as it is now, with the ``figures`` of `Measure` and further fields."""
        size = footprint(model, stored_dtype=self._stored_dtype())
        fields: dict[str, Any] = {
            "method": method,
            "model": self.cfg.model.path or f"{self.cfg.model.body}-{model.config.hidden_act}-{_shape(model)}",
            "data": self.data.describe(),
            "bits_per_weight": size.bits_per_weight,
            "bytes": size.bytes,
            "tokens_per_s": self.fit.tokens_per_s,
            "train_tokens": self.fit.tokens,
            "steps": self.fit.steps,
            "seed": self.cfg.seed,
            "git_sha": self.started.git_sha,
            "git_dirty": self.started.git_dirty,
            "command": command(),
            "config": plain(self.cfg),
            "versions": versions(),
            "machine": machine(),
            "started": self.started.date,
            "seconds": time.perf_counter() - self.started.clock,
        }
        return RunRecord(**fields, **figures, **more)

    def beside_the_original(self, model: PreTrainedModel) -> tuple[list[RunRecord], dict[str, Any]]:
        """The figures of a trained ``model``, beside the pretrained one that it began as where there was one.

        That one's record comes first and is written. It takes an evaluation of a text (``evaluation=text``) that asks
        for the comparison; without it there is no record and the figures are the model's own.
        """
        path, protocol = self.cfg.model.path, self.measure.protocol
        if path is None or not self.cfg.fit or not isinstance(protocol, TextProtocol) or not protocol.compare:
            return [], self.measure(model)[-1]
        original: Any = from_directory(path)
        original.to(model.device)
        of_original, figures = self.measure(model, original)
        untrained = replace(self, fit=Fit(0, 0, None))
        size = footprint(original, stored_dtype=stored_dtype(path))
        record = untrained.record(FULL_PRECISION, original, of_original)
        record = replace(record, bits_per_weight=size.bits_per_weight, bytes=size.bytes)
        record.write(self.directory / REFERENCE_RECORD)
        return [record], figures | {"quantized_share": footprint(model).quantized_share}

    def keep(self, record: RunRecord) -> RunRecord:
        """Write the record that ends the arm."""
        record.write(self.directory / RECORD)
        return record

    def export(self, model: PreTrainedModel, record: RunRecord) -> None:
        """Write what the configuration asks for; what is there is whole: a run stopped after it."""
        for exporter in build_all(self.cfg.export).values():
            path = self.directory / exporter.filename
            if not path.exists():
                print(describe(exporter.write(model, self.data.tokenizer, path, asdict(record))))

    def _stored_dtype(self) -> torch.dtype | None:
        """The dtype of a checkpoint that was not trained on: its weights are float32 here, but not in its files."""
        path = self.cfg.model.path
        return None if self.cfg.fit or path is None else stored_dtype(path)


def refuse_exports(cfg: DictConfig, model: PreTrainedModel, data: TextDataModule) -> None:
    """Raise InputError where a format that is asked for cannot carry ``model`` or the data's tokenizer."""
    for name, exporter in build_all(cfg.export).items():
        refuse_problems(exporter.problems(model, data.tokenizer), f"export={name}")


def all_exported(cfg: DictConfig, directory: Path) -> bool:
    """Whether everything that the configuration asks for is in a run's folder."""
    return all((directory / exporter.filename).exists() for exporter in build_all(cfg.export).values())


@cache
def _code() -> tuple[str | None, bool | None]:
    """Commit and changes of the code, as they were when the process asked first."""
    return git_state(Path(__file__).parent)


def _shape(model: PreTrainedModel) -> str:
    return f"{model.config.hidden_size}x{model.config.num_hidden_layers}"
