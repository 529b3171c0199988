"""The end of a sweep: one table and one picture of all its runs, and what stopped the runs that failed.

Hydra's launchers go on after a failed job, but its sweeper then raises the first failure and never reports that the
sweep has ended (`on_multirun_end` is not called). So each job notes in its own folder what it was asked for and how it
ended, wherever it runs, and the comparison is made at the sweep's end or, after a failure, by `finish`.
"""

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, flag_override

from bitnet.errors import InputError
from bitnet.experiment.cells import CELLS, JOB
from bitnet.files import atomic_file

if TYPE_CHECKING:
    from bitnet.report import RunRecord

# Below a job's folder, in the order of the table's rows.
RECORDS = ("run/reference.json", "run/dense/run.json", "run/latent.json", "run/run.json")
TUNED = "optim."  # keys that each method may have its own best value of
BEST = " (best)"  # after the label of the row with the lowest loss, where several differ in such keys alone

_open_sweeps: list[
    Path
] = []  # folders; a list because a callback is an object of Hydra's, which the program cannot reach


class CompareRuns(Callback):
    """Hydra callback: compares the runs of ``train.py -m``. In a run of its own it does nothing."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not config.get("dry_run"):
            limit_parallel_jobs(config)
            _open_sweeps.append(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        finish()

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


def finish() -> None:
    """Compare the runs of a sweep that was begun and not compared yet. The program calls it last, whatever happened."""
    while _open_sweeps:
        compare_runs(_open_sweeps.pop())


@dataclass(slots=True)
class Row:
    """A record of the sweep, and the overrides of the job that made it."""

    record: "RunRecord"
    overrides: Sequence[str]

    @property
    def arm(self) -> tuple[str, ...]:
        """What the row is, whatever it was tuned with."""
        return (self.record.method, *(each for each in self.overrides if not each.lstrip("+").startswith(TUNED)))


def compare_runs(directory: Path) -> None:
    """Print one table of the records below a sweep's folder and write results.md and pareto.png into it.

    A full-precision row that several runs share stands there once; rows of one name get the overrides that tell them
    apart, and the best of those that differ in their optimizer alone says so; the picture shows no others. A model that
    was trained on without a twin of its own is measured against the best full-precision one of as many tokens. Then a
    line each for the jobs that failed or never ended. Nothing is written where no job succeeded.
    """
    from bitnet.report import pareto, results_markdown, results_table, terminal

    jobs = _jobs(directory)
    rows = _rows(directory, jobs)
    console = terminal()
    failures = [f"{name} ({_words(job['overrides'])}): {job['error']}" for name, job in jobs.items() if job["error"]]
    if rows:
        others = _tuned_better(rows)
        records = _labelled(rows, others)
        console.print(results_table(records, title=f"All runs ({directory})", width=console.width))
        text = results_markdown(records)
        if failures:
            text += "\nFailed jobs:\n\n" + "".join(f"- {failure}\n" for failure in failures)
        with atomic_file(directory / "results.md") as partial:
            partial.write_text(text, encoding="utf-8")
        try:
            drawn = [each for index, each in enumerate(records) if index not in others]
            pareto(drawn, directory / "pareto.png")
        except InputError as error:  # nothing quantized, or texts that differ: the table is still one
            console.print(f"no picture: {error}", markup=False)
    for failure in failures:
        console.print(f"failed: {failure}", markup=False, soft_wrap=True)
    if unfinished := [name for name, job in jobs.items() if job["unfinished"]]:
        console.print(f"not finished: {', '.join(unfinished)}: the same command goes on", markup=False, soft_wrap=True)


def _jobs(directory: Path) -> dict[str, dict[str, Any]]:
    """What each job noted, by the name of its folder: in the order of a list of cells, else in that of the numbers."""
    listed = json.loads(path.read_text(encoding="utf-8")) if (path := directory / CELLS).exists() else {}
    names = sorted((file.parent.name for file in directory.glob(f"*/{JOB}")), key=lambda name: (len(name), name))
    jobs = {name: {"overrides": words, "error": None, "unfinished": True} for name, words in listed.items()}
    for name in names:
        found = json.loads((directory / name / JOB).read_text(encoding="utf-8"))
        jobs[name] = {**found, "unfinished": False}
    return jobs


def _rows(directory: Path, jobs: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The records of all jobs, full precision first and each result of it once, with what they are measured against."""
    from bitnet.report.tables import gap_of, is_full_precision

    rows: list[Row] = []
    seen: set[tuple[Any, ...]] = set()
    for name, job in jobs.items():
        own = _read(directory / name)
        for record in own:
            result = (record.method, record.model, record.nll, json.dumps(record.evaluation, sort_keys=True))
            if is_full_precision(record) and result in seen:
                continue
            seen.add(result)
            record = dataclasses.replace(record, gap=gap_of(record, own))  # to the run's own twin, where it has one
            rows.append(Row(record, job["overrides"]))
    rows.sort(key=lambda row: not is_full_precision(row.record))  # stable: full precision first
    dense = [row.record for row in sorted(rows, key=_loss) if is_full_precision(row.record)]  # the best first
    for row in rows:
        alike = [each for each in dense if each.train_tokens == row.record.train_tokens]
        row.record = dataclasses.replace(row.record, gap=gap_of(row.record, alike))
    return rows


def _loss(row: Row) -> float:
    return math.inf if row.record.nll is None else row.record.nll


def _tuned_better(rows: Sequence[Row]) -> set[int]:
    """The places of the rows that another one beats which differs in keys of the optimizer alone."""
    best: dict[tuple[str, ...], int] = {}
    for index, row in enumerate(rows):
        before = best.setdefault(row.arm, index)
        if _loss(row) < _loss(rows[before]):
            best[row.arm] = index
    return {index for index, row in enumerate(rows) if best[row.arm] != index}


def _labelled(rows: Sequence[Row], others: set[int]) -> "list[RunRecord]":
    """The records, named so that no two are called alike; the best of an arm says so."""
    count = Counter(row.record.method for row in rows)
    shared = {
        method: set.intersection(*(set(row.overrides) for row in rows if row.record.method == method))
        for method in count
    }
    arms = Counter(row.arm for row in rows)
    records = []
    for index, row in enumerate(rows):
        name = row.record.method
        own = [each for each in row.overrides if each not in shared[name]]
        label = f"{name} {_words(own)}" if own else name
        if arms[row.arm] > 1 and index not in others:
            label += BEST
        records.append(dataclasses.replace(row.record, method=label))
    return records


def _read(folder: Path) -> "list[RunRecord]":
    from bitnet.report import RunRecord

    records = []
    for path in (folder / name for name in RECORDS):
        try:
            records += [RunRecord.read(path)] if path.exists() else []
        except InputError as error:  # damaged, or of a later version: the other rows still stand
            print(f"left out of the table: {error}")
    return records


def _words(overrides: Sequence[str]) -> str:
    return " ".join(each.removeprefix("ptq.") for each in overrides) if overrides else "no overrides"


def limit_parallel_jobs(config: DictConfig) -> None:
    """Let ``hydra/launcher=joblib`` run as many jobs at once as memory and processors allow, and say how many.

    A number given with ``hydra.launcher.n_jobs`` stays. The memory is that of the sweep's settings without what is
    varied: where jobs differ in size, give a number.
    """
    launcher = config.hydra.launcher
    if not str(launcher.get("_target_", "")).endswith("JoblibLauncher") or launcher.n_jobs != -1:
        return
    from bitnet.experiment.estimate import memory_of_a_run

    need, free = memory_of_a_run(config), _free_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(cores, int(free // need)))
    with flag_override(config, "readonly", False):
        launcher.n_jobs = count
    print(
        f"{count} jobs at once: about {need / 1e9:.1f} GB each of {free / 1e9:.1f} GB free, {cores} processors "
        "(hydra.launcher.n_jobs=N chooses)",
        flush=True,
    )


def _free_memory() -> int:
    """Bytes that can be taken without swapping."""
    import psutil

    return psutil.virtual_memory().available


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
