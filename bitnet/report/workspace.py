"""The dashboard of a W&B project, defined here and made in any account: ``python -m bitnet.report wandb``.

`SECTIONS` says what is shown, by the names that a run logs (`bitnet.report.results`). From it come a workspace (live,
runs grouped by method) and a report (a page of text and charts to send around). Nothing is made by hand, so that two
accounts show the same.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitnet.errors import InputError
from bitnet.report.loggers import require
from bitnet.report.wandb import SERVER, has_key, unreachable

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

TITLE = "Quantization: rounding against training"
STEP = "trainer/global_step"
BITS, GAP = "result/bits_per_weight", "result/gap"
GROUPS = ("Group", "Name")  # by method, then by run: charts show the finest groups, and a mean of 2 and 4 bits is none
COLUMNS = ("result/bits_per_weight", "result/perplexity", "result/gap", "result/bytes", "train/tokens_per_s")


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart.

    Attributes:
        kind: "line" (over steps), "scatter" (a point for each run), "bar" (one for each group), "table" (a logged one)
            or "bars of a table" (one for each of its rows).
        title: above it.
        y: names of what is drawn: metrics, or a table and the columns for labels and values.
        x: the metric across, of a scatter.
        log: whether the vertical axis is logarithmic.
        pattern: a regular expression that chooses the metrics of a line instead of ``y``.
    """

    kind: str
    title: str
    y: tuple[str, ...] = ()
    x: str = STEP
    log: bool = False
    pattern: str | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """Charts that belong together, and the words that a report has above them."""

    title: str
    text: str
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        "Results",
        "Every point is a run. Bits are stored bits a weight of the quantized layers: codes, scales and everything "
        "else that a file has to hold. A gap is the loss above the full-precision model's on the same tokens. Down and "
        "to the left is better. Compare runs of one text and one protocol only (columns of the table).",
        (
            Panel("scatter", "Gap against stored bits", (GAP,), BITS),
            Panel("scatter", "Perplexity against stored bits", ("result/perplexity",), BITS, log=True),
            Panel("scatter", "Perplexity against bytes of the model", ("result/perplexity",), "result/bytes", log=True),
            Panel("bar", "Gap by method, nats a token", (GAP,)),
            Panel("table", "Records", ("records",)),
        ),
    ),
    Section(
        "Training",
        "Losses of the runs that train, dense twins included.",
        (
            Panel("line", "Validation loss, nats a token", ("val/loss",)),
            Panel("line", "Training loss, nats a token", ("train/loss",)),
            Panel("line", "Learning rate", ("train/lr",)),
            Panel("line", "Norm of the gradient", ("train/grad_norm",), log=True),
        ),
    ),
    Section(
        "Health of the quantized layers",
        "Shares of zeros, of codes that flip, of updates lost in rounding, of inputs at the ends of their range; "
        "drift of the scales.",
        tuple(
            Panel("line", title, (f"health/{name}",))
            for name, title in (
                ("zeros", "Zeros"),
                ("flips", "Codes that flip"),
                ("lost_updates", "Lost updates"),
                ("edges", "Inputs at the ends of the range"),
                ("scale_drift", "Drift of the scales"),
            )
        ),
    ),
    Section(
        "Layers",
        "What quantization after training did to each layer: error of its outputs, as a share of their energy.",
        (
            Panel("bars of a table", "Output error of each layer", ("layers", "name", "relative_error")),
            Panel("table", "Layers", ("layers",)),
            Panel("line", "Zeros of each layer in training", pattern="health/.+/zeros"),
        ),
    ),
    Section("Samples", "What the models wrote while they learnt.", (Panel("table", "Samples", ("samples",)),)),
)
# Histograms (weights/LAYER, codes/LAYER) have panels of their own: the workspace adds one for every logged name.


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Prints where the workspace and the report are, or with ``--print`` what they show.

    Exits with 1 and one line where there is no key, no server, or W&B refuses.
    """
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.print:
            print(json.dumps(specification(options.entity, options.project), indent=2))
            return
        if not options.entity or not options.project:
            raise InputError("--entity (your user or team name on W&B) and --project say where the dashboard goes")
        for what, address in create(options.entity, options.project, report=not options.workspace_only):
            print(f"{what}: {address}")
    except InputError as error:
        sys.exit(f"error: {error}")


def specification(entity: str | None = None, project: str | None = None) -> dict[str, Any]:
    """What workspace and report show, as plain values; needs neither an account nor the package wandb-workspaces."""
    sections = [
        {
            "title": section.title,
            "text": section.text,
            "panels": [
                {key: value for key in Panel.__slots__ if (value := getattr(panel, key)) not in (None, (), False)}
                for panel in section.panels
            ],
        }
        for section in SECTIONS
    ]
    place = {"entity": entity, "project": project, "title": TITLE}
    return {**place, "group_by": list(GROUPS), "columns": list(COLUMNS), "sections": sections}


def create(entity: str, project: str, *, report: bool = True) -> list[tuple[str, str]]:
    """Save the workspace and the report in an account; return what each is and its address.

    Raises:
        InputError: a package is missing, there is no key or no server, or W&B refuses.
    """
    refuse_without_account()
    import wandb
    from wandb.errors import Error

    try:
        wandb.Api(timeout=30).viewer  # noqa: B018  # a key that is not valid shows here, in W&B's own words
        saved = [("workspace", workspace(entity, project).save().url)]
        if report:
            saved.append(("report", build_report(entity, project).save().url))
    except (Error, ValueError, OSError) as error:  # HTTP errors are OSErrors
        raise InputError(
            f"W&B did not take the dashboard for {entity}/{project}: {error}. Check the names, and that the key may "
            "write there"
        ) from error
    return saved


def refuse_without_account() -> None:
    """Raise InputError where W&B would ask for a key or wait for a server."""
    require("wandb_workspaces", extra="wandb")
    server = os.environ.get("WANDB_BASE_URL", SERVER)
    if (mode := os.environ.get("WANDB_MODE", "online")) != "online":
        raise InputError(f"a dashboard is made on {server}, and WANDB_MODE={mode} forbids it: unset it, or use --print")
    if not has_key(server):
        raise InputError(
            f"expected a key for {server}, found none: run wandb login, or set WANDB_API_KEY; --print shows the "
            "dashboard without one"
        )
    if problem := unreachable(server):
        raise InputError(f"{server} cannot be reached ({problem}): try again later; --print shows the dashboard")


def workspace(entity: str, project: str) -> "Workspace":
    """The workspace as wandb-workspaces' object, not saved: sections of panels, runs grouped by method.

    Raises:
        InputError: wandb-workspaces is not installed.
    """
    require("wandb_workspaces", extra="wandb")
    from wandb_workspaces import workspaces
    from wandb_workspaces.expr import Metric, Ordering, Summary

    sections = [
        workspaces.Section(name=section.title, panels=_panels(section), is_open=section.title != "Samples")
        for section in SECTIONS
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP, max_runs=50),
        runset_settings=workspaces.RunsetSettings(
            groupby=[Metric(name) for name in GROUPS],
            order=[Ordering(Summary(GAP), ascending=True)],
            pinned_columns=[f"summary:{name}" for name in COLUMNS],
        ),
        auto_generate_panels=True,
    )


def build_report(entity: str, project: str) -> "Report":
    """The report as wandb-workspaces' object, not saved: words, and the same panels as the workspace.

    Raises:
        InputError: wandb-workspaces is not installed.
    """
    require("wandb_workspaces", extra="wandb")
    import wandb_workspaces.reports.v2 as reports

    blocks: list[Any] = [reports.TableOfContents()]
    for section in SECTIONS:
        runs = reports.Runset(entity=entity, project=project, name="all runs")
        panels = _panels(section)
        blocks += [reports.H1(section.title), reports.P(section.text), reports.PanelGrid(runsets=[runs], panels=panels)]
    return reports.Report(entity=entity, project=project, title=TITLE, blocks=blocks, width="fluid")


def _panels(section: Section) -> list[Any]:
    """The panels of a section, three in a row of 24 columns; tables take a row."""
    import wandb_workspaces.reports.v2 as reports

    made, across, down = [], 0, 0
    for panel in section.panels:
        width = 24 if panel.kind == "table" else 8
        if across + width > 24:
            across, down = 0, down + 8
        made.append(_panel(panel, reports.Layout(x=across, y=down, w=width, h=8)))
        across += width
    return made


def _panel(panel: Panel, layout: Any) -> Any:
    import wandb_workspaces.reports.v2 as reports

    match panel.kind:
        case "line":
            chosen: dict[str, Any] = {"metric_regex": panel.pattern} if panel.pattern else {"y": list(panel.y)}
            return reports.LinePlot(title=panel.title, x=panel.x, log_y=panel.log, layout=layout, **chosen)
        case "scatter":
            x, y = reports.SummaryMetric(panel.x), reports.SummaryMetric(panel.y[0])
            return reports.ScatterPlot(title=panel.title, x=x, y=y, log_y=panel.log, layout=layout)
        case "bar":
            return reports.BarPlot(title=panel.title, metrics=list(panel.y), groupby="Group", layout=layout)
        case "table":
            return reports.WeavePanelSummaryTable(table_name=panel.y[0], layout=layout)
        case "bars of a table":
            table, label, value = panel.y
            return reports.CustomChart(
                query={"summaryTable": {"tableKey": table}},
                chart_name="wandb/bar/v0",
                chart_fields={"label": label, "value": value},
                chart_strings={"title": panel.title},
                layout=layout,
            )
    raise AssertionError(f"a panel of kind {panel.kind!r}")


def logged_names() -> list[str]:
    """Metrics and tables that the dashboard shows; regular expressions start with ``~``."""
    panels = [panel for section in SECTIONS for panel in section.panels]
    names = {*COLUMNS, *(panel.x for panel in panels)}
    for panel in panels:
        names.update(panel.y[:1] if panel.kind.endswith("table") else panel.y)
        if panel.pattern:
            names.add(f"~{re.compile(panel.pattern).pattern}")
    return sorted(names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bitnet.report wandb",
        description="Make the dashboard of the runs in a W&B project: a workspace and a report.",
    )
    parser.add_argument("--entity", help="your user or team name on W&B")
    parser.add_argument("--project", help="the project that runs are logged to (logger.wandb.project)")
    parser.add_argument("--workspace-only", action="store_true", help="leave out the report")
    parser.add_argument(
        "--print", "--dry-run", action="store_true", dest="print", help="print what would be made; needs no account"
    )
    return parser
