"""What a run leaves behind: its record, its logs, tables and pictures."""

from bitnet.report.layers import LayerRow, layers_markdown, layers_picture, write_layers_csv
from bitnet.report.loggers import close_loggers, csv_logger, make_loggers, tensorboard_logger
from bitnet.report.pareto import pareto
from bitnet.report.plots import read_metrics, training_curves
from bitnet.report.record import RunRecord, git_state, machine, versions
from bitnet.report.results import publish
from bitnet.report.tables import results_markdown, results_table, terminal
from bitnet.report.wandb import wandb_logger

__all__ = [
    "LayerRow",
    "RunRecord",
    "close_loggers",
    "csv_logger",
    "git_state",
    "layers_markdown",
    "layers_picture",
    "machine",
    "make_loggers",
    "pareto",
    "publish",
    "read_metrics",
    "results_markdown",
    "results_table",
    "tensorboard_logger",
    "terminal",
    "training_curves",
    "versions",
    "wandb_logger",
    "write_layers_csv",
]
