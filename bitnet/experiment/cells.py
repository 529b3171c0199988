"""The cells of a sweep: what each is called, whether it is finished, and who is at work in it.

A sweep's folder has one folder a cell, and in it ``job.json`` (how the cell ended) beside ``run/`` (the run itself).
The same command on the same folder therefore goes on: finished cells stay as they are, others continue or begin. What
a cell was started with is in its ``run/config.yaml``, so other settings on the same folder are noticed and refused.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bitnet.errors import InputError

JOB = "job.json"  # in a cell's folder: its overrides, and its error or null
CELLS = "cells.json"  # in the sweep's folder: the overrides of every cell by its name, in order
RUN = "run"  # the run's folder in the cell's folder
SETTINGS = "config.yaml"  # in a run's folder: what the run was started with
RECORD = "run.json"  # in a run's folder, once it is finished
# A run may be continued with others of these: where it lies, how it is computed, what is written once it is over.
FREE = ("output_dir", "resume", "threads", "cache_dir", "dry_run", "export")
SHOWN = 5  # differences that a refusal names


def cell_name(overrides: Sequence[str]) -> str:
    """A folder's name that says what the cell is: ``qat158_lr-0.001`` for +experiment=qat158 optim.lr=0.001.

    Groups stand as their choice, values as the last part of their key and the value; letters, digits, ``_``, ``-`` and
    ``.`` only, so that the path can be given on a command line as it is.
    """
    words = []
    for each in overrides:
        key, _, value = each.lstrip("+~").partition("=")
        words.append(f"{key.rpartition('.')[2]}-{value}" if "." in key else value)
    return re.sub(r"[^\w.-]+", "-", "_".join(words)).strip("-.")


def sweep_cell() -> Path | None:
    """The folder of this cell of a sweep; None for a run of its own."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().runtime.output_dir)


def is_finished(folder: Path, cfg: DictConfig) -> bool:
    """Whether the cell in ``folder`` ended well with the settings ``cfg``, everything that they export included.

    Raises:
        InputError: a run with other settings is there.
    """
    refuse_other_settings(folder / RUN, cfg)
    if not (folder / JOB).exists() or not (folder / RUN / RECORD).exists():
        return False
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    return job["error"] is None and _stored(folder / RUN).get("export") == _plain(cfg).get("export")


def refuse_other_settings(run: Path, cfg: DictConfig) -> None:
    """Raise InputError where ``run`` holds a run with other settings than ``cfg``; the message names them."""
    if not (run / SETTINGS).exists():
        return
    before, now = dict(_leaves(_stored(run))), dict(_leaves(_plain(cfg)))
    found = [
        f"{key} was {before.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in {**before, **now}
        if key.split(".")[0] not in FREE and _differ(before, now, key)
    ]
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise InputError(
            f"{run} was started with other settings: {'; '.join(found[:SHOWN])}{more}: choose another "
            f"hydra.sweep.dir, or remove {run.parent} to run it again"
        )


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold the cell in ``folder``, so that no second process works in it. A process that dies lets go of it.

    Raises:
        InputError: another process holds it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"another process is at work in {folder}: wait for it, or end it first") from None
    try:
        yield
    finally:
        lock.release()


def _differ(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> bool:
    if key in before and key in now:
        return before[key] != now[key]
    return bool(before.get(key) or now.get(key))  # an option that a version lacks is off there


def _stored(run: Path) -> dict[str, Any]:
    cfg = OmegaConf.load(run / SETTINGS)
    assert isinstance(cfg, DictConfig)
    return _plain(cfg)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """The values of ``cfg`` without Hydra's own, every interpolation resolved."""
    values = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in map(str, cfg) if key != "hydra"]))
    return OmegaConf.to_container(OmegaConf.create(values), resolve=True)  # type: ignore[return-value]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping, by its dotted key; an empty mapping is one."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
