"""Find the records below the folders of runs and sweeps, and say of everything that cannot be shown why."""

import dataclasses
import json
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from bitnet.errors import InputError
from bitnet.report.record import RunRecord
from bitnet.report.tables import is_full_precision

RECORD, LATENT, REFERENCE = "run.json", "latent.json", "reference.json"
SETTINGS, JOB = "config.yaml", "job.json"
# In a run's folder, and without records in them: large, and not worth the walk.
PASSED_BY = {"checkpoints", "csv", "gptq", "packed", "quantized", "tensorboard", "wandb"}
# What two runs of the same settings differ in.
INCIDENTAL = (
    "command",
    "git_dirty",
    "git_sha",
    "machine",
    "quantize_seconds",
    "seconds",
    "started",
    "tokens_per_s",
    "versions",
)
# Fields that the page reads.
TYPES: dict[Any, tuple[str, ...]] = {
    dict: ("config", "data"),
    str: ("method", "model", "command", "started"),
    str | None: ("git_sha",),
    int | float: ("bits_per_weight", "bytes", "train_tokens", "steps", "seed", "seconds"),
    int | float | None: (
        *("nll", "perplexity", "bits_per_byte", "gap", "kl", "claimed_bits", "quantized_share"),
        *("top1_agreement", "quantize_seconds"),
    ),
    (dict, NoneType): ("evaluation",),
}
PLACES = ("cache_dir", "dry_run", "output_dir", "resume", "threads")  # keys of a configuration that change no result


@dataclass(frozen=True, slots=True)
class Run:
    """A record and the file that it was read from. Curves, layers and samples of its run stand beside it."""

    record: RunRecord
    path: Path

    @property
    def folder(self) -> Path | None:
        """The run's folder, or None where the file is of the original that a run was compared with."""
        return self.path.parent if self.path.name == RECORD else None

    @property
    def command(self) -> str:
        """What makes this record again: of a sweep's job its own settings, not the command of the whole sweep."""
        for folder in self.path.parents[1:3]:  # JOB/run/run.json, JOB/run/dense/run.json
            try:
                overrides = json.loads((folder / JOB).read_text(encoding="utf-8"))["overrides"]
            except (OSError, ValueError, LookupError, TypeError):  # no job, or one that is told of elsewhere
                continue
            if isinstance(overrides, list):
                return shlex.join(["python", "train.py", *map(str, overrides)])
        return self.record.command


@dataclass(slots=True)
class Collected:
    """The records found, in the order of their places, and a sentence on each thing that was left out."""

    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repeated: int = 0


def collect(places: Iterable[str | Path]) -> Collected:
    """Read every record at or below ``places``: folders of runs, folders of sweeps, or single record files.

    A record that cannot be read, a run that did not end and a job that failed are noted, and the others read. A result
    that several records tell of stays once: the original of every run of a sweep, a run that was repeated.

    Raises:
        InputError: A place does not exist, or no record that can be read is at any of them.
    """
    found = Collected()
    seen: set[Path] = set()
    results: set[str] = set()
    for place in map(Path, places):
        if not place.exists():
            raise InputError(f"expected the folder of a run or a sweep, or a record, and {place} does not exist")
        for path in _files(place, found.notes):
            if path.resolve() in seen:  # places may overlap
                continue
            seen.add(path.resolve())
            _add(path, found, results)
    if not found.runs:
        reasons = f" ({'; '.join(found.notes[:3])})" if found.notes else ""
        raise InputError(
            f"expected runs with a {RECORD} at or below {', '.join(map(str, places)) or 'the places named'}, "
            f"found none that can be shown{reasons}: name the folder of a run or a sweep, as python train.py prints it"
        )
    return found


def _add(path: Path, found: Collected, results: set[str]) -> None:
    try:
        record = RunRecord.read(path)
    except (InputError, OSError) as error:
        found.notes.append(f"Left out: {error}" if str(path) in str(error) else f"Left out: {path}: {error}")
        return
    if wrong := _misfits(record):
        found.notes.append(f"Left out: {path} is no run record: {', '.join(wrong)}")
        return
    key = _result(record)
    if key in results:
        found.repeated += 1
        return
    results.add(key)
    found.runs.append(Run(record, path))


def _misfits(record: RunRecord) -> list[str]:
    """What is of another type than a record's fields are: json can hold anything."""
    wrong = [
        f"{name} is {type(value).__name__}"
        for kind, names in TYPES.items()
        for name in names
        if not isinstance(value := getattr(record, name), kind) or isinstance(value, bool)
    ]
    pairs = {name: getattr(record, name) for name in ("nll_interval", "gap_interval")}
    good = [value is None or (isinstance(value, list) and len(value) == 2) for value in pairs.values()]
    return wrong + [f"{name} is {pairs[name]!r}" for name, fits in zip(pairs, good, strict=True) if not fits]


def _files(place: Path, notes: list[str]) -> Iterator[Path]:
    """The record files at or below ``place``. A latent model is passed by: it answers as its frozen form.

    Symbolic links are followed, to each folder once: a link may lead to where it stands.
    """
    if place.is_file():
        yield place
        return
    walked: set[Path] = set()

    def note(error: OSError) -> None:
        notes.append(f"Left out: {error}")

    for folder, folders, files in os.walk(place, onerror=note, followlinks=True):
        here = Path(folder)
        if here.resolve() in walked:
            folders.clear()
            continue
        walked.add(here.resolve())
        folders[:] = sorted(name for name in folders if name not in PASSED_BY and not name.startswith("."))
        yield from (here / name for name in (REFERENCE, RECORD) if name in files)
        if JOB in files:
            _note_failure(here / JOB, notes)
        if RECORD not in files and (SETTINGS in files or LATENT in files):
            notes.append(f"Left out: {here} has no {RECORD}: the run did not end (python train.py resume={here})")


def _note_failure(path: Path, notes: list[str]) -> None:
    """Note what stopped a job of a sweep."""
    try:
        job: Any = json.loads(path.read_text(encoding="utf-8"))
        error, overrides = job["error"], job["overrides"]
    except (OSError, ValueError, LookupError, TypeError) as problem:
        notes.append(f"Not read: {path}: {type(problem).__name__}: {problem}")
        return
    if error:
        notes.append(f"Failed: {path.parent} ({' '.join(map(str, overrides))}): {error}")


def _result(record: RunRecord) -> str:
    """What tells one result from another: of full precision the loss, of others all but circumstances."""
    if is_full_precision(record):
        where = {name: record.data.get(name) for name in ("corpus_hash", "tokenizer_hash", "name")}
        return json.dumps([record.model, record.nll, record.bytes, where, record.evaluation], sort_keys=True)
    plain = dataclasses.asdict(record)
    for name in INCIDENTAL:
        del plain[name]
    plain["config"] = {key: value for key, value in record.config.items() if key not in PLACES}
    return json.dumps(plain, sort_keys=True)
