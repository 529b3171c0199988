"""The W&B dashboard is defined in code: it shows what runs log, in words that W&B's own package takes."""

import json
import os
import subprocess
import sys

import pytest

from bitnet.errors import InputError
from bitnet.report import workspace
from bitnet.report.__main__ import main

pytest.importorskip("wandb_workspaces")
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # in wandb-workspaces 0.4
PLACE = ("someone", "bitnet")


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """No key, no netrc, no mode set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    monkeypatch.setattr(os, "environ", {**kept, "HOME": str(tmp_path)})


def saved_spec() -> dict:
    """What the workspace would send to W&B."""
    view = workspace.workspace(*PLACE)._to_model()  # the package has no public way to look at it offline
    return json.loads(view.model_dump_json(by_alias=True))["spec"]


def test_the_workspace_has_every_section_and_panel_in_order():
    sections = saved_spec()["section"]["panelBankConfig"]["sections"]
    assert [each["name"] for each in sections][: len(workspace.SECTIONS)] == [each.title for each in workspace.SECTIONS]
    for made, section in zip(sections, workspace.SECTIONS, strict=False):
        assert len(made["panels"]) == len(section.panels)


def test_the_pareto_chart_has_stored_bits_across_and_the_gap_up():
    panels = [
        panel for section in saved_spec()["section"]["panelBankConfig"]["sections"] for panel in section["panels"]
    ]
    scatter = next(panel["config"] for panel in panels if panel["viewType"] == "Scatter Plot")
    assert scatter["xAxis"] == "summary:result/bits_per_weight"
    assert scatter["yAxis"] == "summary:result/gap"


def test_no_two_panels_of_a_section_lie_on_each_other():
    for section in workspace.SECTIONS:
        taken = set()
        for panel in workspace._panels(section):
            cells = {
                (x, y)
                for x in range(panel.layout.x, panel.layout.x + panel.layout.w)
                for y in range(panel.layout.y, panel.layout.y + panel.layout.h)
            }
            assert not cells & taken, (section.title, panel)
            assert max(x for x, _ in cells) < 24
            taken |= cells


def test_runs_stand_by_method_and_each_is_a_point_of_its_own():
    runs = saved_spec()["section"]["runSets"][0]
    assert [key["name"] for key in runs["grouping"]] == ["group", "displayName"]


def test_the_report_has_words_and_charts_for_every_section():
    blocks = workspace.build_report(*PLACE).blocks
    kinds = [type(block).__name__ for block in blocks]
    assert kinds == ["TableOfContents"] + ["H1", "P", "PanelGrid"] * len(workspace.SECTIONS)


def test_printing_needs_no_account_and_says_everything(stranger, capsys):
    main(["wandb", "--entity", "someone", "--project", "bitnet", "--dry-run"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["entity"], printed["project"]) == PLACE
    assert [each["title"] for each in printed["sections"]] == [each.title for each in workspace.SECTIONS]
    assert sum(len(each["panels"]) for each in printed["sections"]) == sum(len(s.panels) for s in workspace.SECTIONS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "expected a key for https://api.wandb.ai, found none: run wandb login"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "WANDB_MODE=offline forbids it"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_without_an_account_there_is_an_error_in_one_line_and_no_prompt(stranger, monkeypatch, settings, expected):
    for name, value in settings.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(SystemExit, match=r"^error: ") as error:
        main(["wandb", "--entity", "someone", "--project", "bitnet"])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_no_entity_is_an_error_that_names_the_option(stranger):
    with pytest.raises(SystemExit, match="--entity"):
        main(["wandb", "--project", "bitnet"])


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr("bitnet.report.loggers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "bitnet-qat\[wandb\]"'):
        workspace.create(*PLACE)


@pytest.mark.slow
def test_the_command_line_ends_at_once_where_nobody_can_answer(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    done = subprocess.run(
        [sys.executable, "-m", "bitnet.report", "wandb", "--entity", "someone", "--project", "bitnet"],
        env={**kept, "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: expected a key")
    assert len(done.stderr.splitlines()) == 1
