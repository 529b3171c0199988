"""The loggers of one run: opened before its first step, told how it ended, closed whatever happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from bitnet.experiment.settings import build_all, plain
from bitnet.report import close_loggers, make_loggers

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


@contextmanager
def open_loggers(cfg: DictConfig, directory: Path) -> "Iterator[list[Logger]]":
    """The run's loggers, with its configuration. A run that trains has at least the CSV file.

    They are closed at the end, as failed where an exception ends the block.
    """
    loggers = make_loggers(build_all(cfg.logger), directory, kind=kind_of(cfg)) if cfg.fit or cfg.logger else []
    try:
        for logger in loggers:
            logger.log_hyperparams(plain(cfg))
        yield loggers
    except BaseException:
        close_loggers(loggers, failed=True)
        raise
    close_loggers(loggers)


def kind_of(cfg: DictConfig) -> str:
    """What the run does: "ptq" (quantizes after training), "qat" (trains with quantized weights) or "dense"."""
    if cfg.ptq:
        return "ptq"
    return "dense" if cfg.model.get("layer") is None else "qat"
