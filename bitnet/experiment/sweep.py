"""The end of a sweep: one table and one picture of all its runs, and what stopped the runs that failed.

Hydra's launchers go on after a failed job, but its sweeper then raises the first failure and never reports that the
sweep has ended (`on_multirun_end` is not called). So each job notes in its own folder what it was asked for and how it
ended, wherever it runs, and the comparison is made at the sweep's end or, after a failure, when the program exits.
"""

import atexit
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from bitnet.errors import InputError
from bitnet.files import atomic_file

if TYPE_CHECKING:
    from bitnet.report import RunRecord

JOB = "job.json"  # in a job's folder: its overrides, and its error or null
# Below a job's folder, in the order of the table's rows.
RECORDS = ("run/reference.json", "run/dense/run.json", "run/latent.json", "run/run.json")


class CompareRuns(Callback):
    """Hydra callback: compares the runs of ``train.py -m``. In a run of its own it does nothing."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._report = lambda: compare_runs(Path(config.hydra.sweep.dir))
        atexit.register(self._report)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.unregister(self._report)
        self._report()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            return
        error = None
        if job_return.status != JobStatus.COMPLETED:
            error = _one_line(job_return._return_value)  # the property of that name raises it
        job = {"overrides": list(config.hydra.overrides.task), "error": error}
        folder = Path(config.hydra.runtime.output_dir)
        with atomic_file(folder / JOB) as partial:
            partial.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")


def compare_runs(directory: Path) -> None:
    """Print one table of the records below a sweep's folder and write results.md and pareto.png into it.

    A full-precision row that several runs share stands there once; rows of one name get the overrides that tell them
    apart. Then a line each for the jobs that failed. Nothing is written where no job succeeded.
    """
    from bitnet.report import pareto, results_markdown, results_table, terminal

    jobs = _jobs(directory)
    records = _records(directory, jobs)
    console = terminal()
    failures = [f"{name} ({_words(job['overrides'])}): {job['error']}" for name, job in jobs.items() if job["error"]]
    if records:
        console.print(results_table(records, title=f"All runs ({directory})", width=console.width))
        text = results_markdown(records)
        if failures:
            text += "\nFailed jobs:\n\n" + "".join(f"- {failure}\n" for failure in failures)
        with atomic_file(directory / "results.md") as partial:
            partial.write_text(text, encoding="utf-8")
        try:
            pareto(records, directory / "pareto.png")
        except InputError as error:  # nothing quantized, or texts that differ: the table is still one
            console.print(f"no picture: {error}", markup=False)
    for failure in failures:
        console.print(f"failed: {failure}", markup=False, soft_wrap=True)


def _jobs(directory: Path) -> dict[str, dict[str, Any]]:
    """What each job noted, by the name of its folder, in the order of the numbers."""
    files = sorted(directory.glob(f"*/{JOB}"), key=lambda path: (len(path.parent.name), path.parent.name))
    return {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def _records(directory: Path, jobs: Mapping[str, Mapping[str, Any]]) -> "list[RunRecord]":
    """The records of all jobs, each full-precision result once, labelled so that no two rows have one name."""
    from bitnet.report.tables import gap_of, is_full_precision

    found: list[tuple[RunRecord, Sequence[str]]] = []
    seen: set[tuple[Any, ...]] = set()
    varied = _varied([job["overrides"] for job in jobs.values()])
    for name, job in jobs.items():
        own = _read(directory / name)
        for record in own:
            result = (record.method, record.model, record.nll, json.dumps(record.evaluation, sort_keys=True))
            if is_full_precision(record) and result in seen:
                continue
            seen.add(result)
            record = dataclasses.replace(record, gap=gap_of(record, own))  # to the run's own twin, where it has one
            words = [each for each in job["overrides"] if each in varied]
            found.append((record, [each for each in words if each.partition("=")[2] != record.method]))
    found.sort(key=lambda each: not is_full_precision(each[0]))  # stable: full precision first
    counts = Counter(record.method for record, _ in found)
    return [
        dataclasses.replace(record, method=f"{record.method} {_words(own)}")
        if counts[record.method] > 1 and own
        else record
        for record, own in found
    ]


def _read(folder: Path) -> "list[RunRecord]":
    from bitnet.report import RunRecord

    records = []
    for path in (folder / name for name in RECORDS):
        try:
            records += [RunRecord.read(path)] if path.exists() else []
        except InputError as error:  # damaged, or of a later version: the other rows still stand
            print(f"left out of the table: {error}")
    return records


def _varied(overrides: Sequence[Sequence[str]]) -> set[str]:
    """The overrides that some jobs have and others do not."""
    return {each for job in overrides for each in job if any(each not in other for other in overrides)}


def _words(overrides: Sequence[str]) -> str:
    return " ".join(each.removeprefix("ptq.") for each in overrides) if overrides else "no overrides"


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
