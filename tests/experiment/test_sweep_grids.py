import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from bitnet.data import TokenizerSpec
from bitnet.errors import InputError
from bitnet.models import Size, from_scratch
from hydra_plugins.bitnet_sweeper import GridsSweeper, _chosen, _grid_cells

ROOT = Path(__file__).parents[2]


def cells(grid: list[str], given: list[str]) -> list[tuple[list[str], list[str]]]:
    parser = OverridesParser.create()
    return _grid_cells(parser.parse_overrides(grid), parser.parse_overrides(given))


def test_a_grid_runs_every_combination_with_what_the_command_line_gives():
    found = cells(["+experiment=qat1,qat158", "optim.lr=1e-3,2e-3"], ["+experiment=compare", "model.path=DIR"])
    assert [cell for cell, _ in found] == [
        [f"+experiment={name}", f"optim.lr={rate}", "model.path=DIR"]
        for name in ("qat1", "qat158")
        for rate in ("0.001", "0.002")
    ]
    assert found[0][1] == ["+experiment=qat1", "optim.lr=0.001"]  # what tells cells apart


def test_the_command_line_counts_before_a_grid_and_what_it_sweeps_tells_cells_apart():
    found = cells(["+experiment=dense", "optim.lr=1e-3,2e-3"], ["optim.lr=5e-4", "seed=0,1", "data.path=D"])
    assert [words for _, words in found] == [["+experiment=dense", "optim.lr=0.0005", f"seed={n}"] for n in (0, 1)]


def test_patterns_choose_cells_and_one_without_a_match_is_refused():
    named = {"dense_lr-1": [], "qat158_lr-1": [], "qat158_lr-2": []}
    assert list(_chosen(named, ["qat158*"])) == ["qat158_lr-1", "qat158_lr-2"]
    with pytest.raises(InputError, match=r"no cell is called qta\*: there are dense_lr-1, qat158_lr-1"):
        _chosen(named, ["qat158*", "qta*"])


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ({}, "needs grids"),
        ({"a": ["optim.lr=1,2"], "b": ["optim.lr=2"]}, r"has the cell lr-2 \(optim.lr=2\) twice"),
    ],
)
def test_grids_that_make_no_sweep_are_refused(grids, message):
    sweeper = GridsSweeper(grids, ["*"])
    sweeper.hydra_context = SimpleNamespace(config_loader=None)  # what the parser needs of it: nothing
    with pytest.raises(InputError, match=message):
        sweeper._cells([])


@pytest.fixture
def sweep(tmp_path, corpus):
    """Run ``+experiment=compare`` on a tiny model and text; arguments are further overrides."""
    model = tmp_path / "model"
    tokenizer = TokenizerSpec(vocab_size=258).load(lambda: ["some text"], "corpus", tmp_path / "tokenizers")
    size = Size(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    from_scratch(body="llama", hidden_act="silu", size=size, vocab_size=258).save_pretrained(model)
    tokenizer.save_pretrained(model)
    settings = [f"model.path={model}", "data=text", "~data.source.test_share", f"data.path={corpus}", "export=none"]
    settings += ["data.block_size=32", "data.batch_size=2", "evaluation.bootstrap=null", "trainer.max_steps=2"]
    settings += ["calibration.windows=2", "calibration.documents=8", "threads=1", "callbacks.samples=null"]
    settings += ["trainer.log_every_n_steps=1"]

    def run(*overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "train.py"), "-m", "+experiment=compare", *settings]
        return subprocess.run(
            [*command, "hydra.sweep.dir=sweep", *overrides],
            cwd=tmp_path,
            env={**os.environ, "BITNET_CACHE": str(tmp_path / "cache"), "COLUMNS": "160", **environment},
            capture_output=True,
            text=True,
            timeout=1200,
        )

    return run


def test_a_dry_run_of_a_sweep_lists_every_cell_as_a_command(sweep, tmp_path):
    done = sweep("dry_run=true", "hydra.sweeper.only=[dense*,ptq_gptq_*]")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line == "  ptq_gptq_bits-2: +experiment=ptq ptq=gptq ptq.bits=2" for line in lines)
    assert any(line.startswith("  dense") for line in lines)
    assert len(lines) == 10  # one above: 3 rates, 3 of gptq, 3 of gptq_refined
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_the_same_command_runs_what_is_left_and_refuses_other_settings(sweep, tmp_path):
    only = "hydra.sweeper.only=[dense*,qat158*,ptq_absmax_bits-4]"
    done = sweep(only, "optim.lr=1e-3,-1")
    assert done.returncode == 1
    assert "5 cells in sweep: 0 finished before, 0 to go on with, 5 new" in done.stdout
    assert "failed: qat158_lr--1 (" in done.stdout
    assert "error: 2 of 5 cells failed" in done.stderr
    folders = ["dense_lr--1", "dense_lr-0.001", "ptq_absmax_bits-4", "qat158_lr--1", "qat158_lr-0.001"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()) == folders
    before = {path: path.read_bytes() for path in (tmp_path / "sweep").glob("*/run/*.json")}
    assert len(json.loads((tmp_path / "sweep" / "cells.json").read_text())) == 5

    done = sweep(only, "optim.lr=1e-3,2e-3", "trainer.max_steps=3")
    assert done.returncode == 1
    assert "run was started with other settings: trainer.max_steps was 2, is 3" in done.stderr

    done = sweep(only, "optim.lr=1e-3,2e-3")  # a cell more for both, and none that fails
    assert done.returncode == 0, done.stderr
    assert "5 cells in sweep: 3 finished before, 0 to go on with, 2 new" in done.stdout
    assert {path: path.read_bytes() for path in before} == before
    assert "failed: dense_lr--1" in done.stdout  # of the first command, still told
    assert (tmp_path / "sweep" / "results.md").read_text().count("(best)") == 3  # dense, latent, frozen
