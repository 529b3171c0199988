"""Where the figures of a training run go while it trains: always to a CSV file, and to what else is asked for.

A logger is made by a function of the run's folder and kind; ``conf/logger/*.yaml`` names those functions. The optional
packages are looked for before the run starts, not at its first step.
"""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bitnet.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger


class LoggerFactory(Protocol):
    """Makes a logger that writes below ``run_dir``; ``kind`` is what the run does: dense, qat or ptq."""

    def __call__(self, run_dir: Path, *, kind: str) -> "Logger": ...


def make_loggers(
    factories: Mapping[str, LoggerFactory | None], run_dir: str | Path, *, kind: str = "run"
) -> "list[Logger]":
    """Return a CSV logger and one logger for each entry of ``factories`` that is not None (an entry switched off)."""
    run_dir = Path(run_dir)
    return [csv_logger(run_dir), *(make(run_dir, kind=kind) for make in factories.values() if make is not None)]


def close_loggers(loggers: "Iterable[Logger]", *, failed: bool = False) -> None:
    """Write out what the loggers still hold, and end the W&B run: a later run in this process would be added to it."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=int(failed))


def csv_logger(run_dir: Path) -> "CSVLogger":
    """Log to ``run_dir/csv/version_N/metrics.csv``: N counts the starts, so that a resumed run overwrites nothing."""
    from lightning.pytorch.loggers import CSVLogger

    # Written at every call, not at every hundredth step: what was logged survives a kill.
    return CSVLogger(run_dir, name="csv", flush_logs_every_n_steps=1)


def tensorboard_logger(run_dir: Path, *, kind: str = "run") -> "TensorBoardLogger":
    """Log to ``run_dir/tensorboard``; watch it with ``tensorboard --logdir runs``. It has no place for ``kind``.

    Raises:
        InputError: TensorBoard is not installed.
    """
    require("tensorboard", extra="tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(run_dir, name="tensorboard", default_hp_metric=False)


def require(package: str, *, extra: str) -> None:
    """Refuse to go on without an optional package.

    Raises:
        InputError: ``package`` cannot be imported.
    """
    if find_spec(package) is None:
        raise InputError(f'{package} is asked for and not installed: pip install "bitnet-qat[{extra}]"')
