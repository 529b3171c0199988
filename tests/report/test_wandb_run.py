"""Real runs of train.py, read back from W&B's offline files with its own reader, beside TensorBoard and CSV."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet.report import RunRecord
from bitnet.report.workspace import logged_names

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "size.hidden_size=32",
    "size.intermediate_size=48",
    "size.num_hidden_layers=2",
    "data=text",
    "data.block_size=32",
    "data.batch_size=2",
    "data.tokenizer.vocab_size=300",
    "trainer.max_steps=6",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1",
    "callbacks.samples.max_new_tokens=4",
    "callbacks.health.every_n_steps=2",
    "evaluation=text",
    "evaluation.window=32",
    "evaluation.bootstrap=50",
    "calibration.windows=4",
    "export=none",
    "logger=all",
]
KINDS = {"qat": ["model=bitnet158"], "ptq": ["model=dense", "ptq=absmax", "ptq.bits=3"]}
LAYERS = [
    f"model.layers.{block}.{part}"
    for block in (0, 1)
    for part in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]
OWN = ("epoch", "step", "trainer/global_step", "hp_metric")  # columns that the loggers add by themselves

# One process for both: loading the libraries takes longer than the runs.
PROGRAM = """
import json, sys
from hydra import compose, initialize_config_dir
from bitnet.experiment.run import run
for overrides in json.loads(sys.argv[2]):
    with initialize_config_dir(sys.argv[1], version_base="1.3"):
        cfg = compose("config", overrides)
    run(cfg)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a run that trains quantized weights, and one that quantizes a dense model it has trained."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(f"Document {n} says that {n} times {n} is {n * n}." for n in range(60)))
    common = [*SETTINGS, f"data.path={corpus}", f"cache_dir={folder / 'cache'}"]
    jobs = [[*common, *options, f"output_dir={folder / kind}"] for kind, options in KINDS.items()]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT / "conf"), json.dumps(jobs)],
        env={**kept, "HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,  # seconds of work; a busy machine may take long
    )
    assert done.returncode == 0, done.stderr
    return folder


def inspected(run: Path) -> list[dict]:
    (directory,) = (run / "wandb").glob("offline-run-*")
    program = Path(sys.executable).parent / "wandb"
    done = subprocess.run(
        [program, "leet", "inspect", "--json", directory], capture_output=True, text=True, timeout=120, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]


def logged(run: Path) -> tuple[dict[str, float], dict[str, list[float]], set[str]]:
    """What W&B holds: the last value of each number, counts of each histogram, names of the tables."""
    numbers, histograms, tables = {}, {}, set()
    for item in (each["history"]["item"] for each in inspected(run) if each["type"] == "history"):
        for key, value in item.items():
            if key.endswith("._type"):
                kind = json.loads(value) if value.startswith('"') else value
                if kind == "table-file":
                    tables.add(key.removesuffix("._type"))
            elif key.endswith(".values"):
                values = json.loads(value) if isinstance(value, str) else value
                histograms[key.removesuffix(".values")] = values
            elif not key.startswith("_") and "._" not in key and isinstance(value, int | float):
                numbers[key] = float(value)
    sizes = {f"{table}.{what}" for table in tables for what in ("ncols", "nrows", "size")}
    return {name: value for name, value in numbers.items() if name not in {*OWN, *sizes}}, histograms, tables


def on_tensorboard(run: Path) -> dict[str, set[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "version_0")).Reload()
    tags = events.Tags()
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    return {"scalars": set(tags["scalars"]) - set(OWN), "histograms": set(tags["histograms"]), "texts": texts}


def csv_columns(run: Path) -> set[str]:
    with (run / "csv" / "version_0" / "metrics.csv").open() as file:
        return set(csv.DictReader(file).fieldnames or ()) - set(OWN)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stands_with_its_method_and_kind_and_has_its_configuration(runs, kind):
    records = inspected(runs / kind)
    (started,) = [each["run"] for each in records if each["type"] == "run"]
    assert started["run_group"] == {"qat": "bitnet158", "ptq": "absmax"}[kind]
    assert started["job_type"] == kind
    assert started["tags"] == [kind]
    assert '"max_steps"' in json.dumps([each for each in records if each["type"] == "config"]).replace("\\", "")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_logged_figures_are_those_of_the_record(runs, kind):
    numbers, _, _ = logged(runs / kind)
    record = RunRecord.read(runs / kind / "run.json")
    for name in ("bits_per_weight", "bytes", "nll", "perplexity", "gap"):
        if (value := getattr(record, name)) is not None:
            assert numbers[f"result/{name}"] == pytest.approx(value, rel=1e-9)
    assert ("result/gap" in numbers) == (record.gap is not None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard_and_csv_carry_the_names_that_wandb_has(runs, kind):
    numbers, histograms, tables = logged(runs / kind)
    there = on_tensorboard(runs / kind)
    assert there["scalars"] == set(numbers)
    assert csv_columns(runs / kind) == set(numbers)
    assert there["histograms"] == set(histograms)
    assert there["texts"] >= tables
    expected = {"codes"} | ({"weights"} if kind == "qat" else set())
    assert set(histograms) == {f"{what}/{layer}" for what in expected for layer in LAYERS}
    assert tables == {"records", "samples"} | ({"layers"} if kind == "ptq" else set())


@pytest.mark.slow
def test_the_histogram_of_codes_counts_every_weight(runs):
    for kind, codes in (("qat", 3), ("ptq", 7)):
        _, histograms, _ = logged(runs / kind)
        counts = histograms["codes/model.layers.0.mlp.up_proj"]
        assert len(counts) <= codes
        assert sum(counts) == 32 * 48


@pytest.mark.slow
def test_the_table_of_records_has_a_row_for_each_record(runs):
    for kind, methods in (("qat", ["bitnet158 latent", "bitnet158 frozen"]), ("ptq", ["full precision", "absmax"])):
        (file,) = (runs / kind / "wandb").glob("offline-run-*/files/media/table/records_*.json")
        table = json.loads(file.read_text())
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        assert [row["method"] for row in rows] == methods
        assert all(row["bits_per_weight"] > 1 for row in rows)


@pytest.mark.slow
def test_the_table_of_samples_has_the_text_of_every_validation(runs):
    (file,) = (runs / "qat" / "wandb").glob("offline-run-*/files/media/table/samples_*.json")
    rows = json.loads(file.read_text())["data"]
    steps = re.findall(r"^## Step (\d+)$", (runs / "qat" / "samples.md").read_text(), re.MULTILINE)
    assert [str(step) for step, _ in rows] == steps


@pytest.mark.slow
def test_the_dashboard_shows_nothing_that_runs_do_not_log(runs):
    names = {"trainer/global_step"}
    for kind in KINDS:
        numbers, _, tables = logged(runs / kind)
        names |= {*numbers, *tables}
    for name in logged_names():
        if name.startswith("~"):
            assert any(re.fullmatch(name[1:], each) for each in names), name
        else:
            assert name in names, name
