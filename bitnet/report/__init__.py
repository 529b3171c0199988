"""What a run leaves behind: its record, its logs, tables and pictures."""

from bitnet.report.record import RunRecord, git_state, machine, versions
from bitnet.report.tables import results_markdown, results_table

__all__ = ["RunRecord", "git_state", "machine", "results_markdown", "results_table", "versions"]
