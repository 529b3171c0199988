import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_records import record
from omegaconf import OmegaConf

from bitnet.experiment.sweep import compare_runs, limit_parallel_jobs
from bitnet.report import RunRecord

ROOT = Path(__file__).parents[2]
CALLBACK = "++hydra.callbacks.compare._target_=bitnet.experiment.sweep.CompareRuns"


def job(sweep: Path, number: int, overrides: list[str], error: str | None = None, **records: RunRecord) -> None:
    folder = sweep / str(number)
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"overrides": overrides, "error": error}))
    for name, each in records.items():
        each.write(folder / "run" / f"{name.replace('__', '/')}.json")


def methods(sweep: Path) -> list[str]:
    lines = (sweep / "results.md").read_text().splitlines()
    return [line.split("|")[1].strip() for line in lines[2:] if line.startswith("|")]


def column(sweep: Path, name: str) -> list[str]:
    lines = [line.split("|") for line in (sweep / "results.md").read_text().splitlines() if line.startswith("|")]
    place = [cell.strip() for cell in lines[0]].index(name)
    return [line[place].strip() for line in lines[2:]]


def test_a_full_precision_row_that_all_runs_share_stands_once_and_first(tmp_path, capsys):
    full = record("full precision", 3.5)
    for number, (name, bits) in enumerate([("rtn", 4.16), ("gptq", 4.25)]):
        quantized = record(name, 3.51 + number / 100, bits_per_weight=bits, gap=0.01 + number / 100)
        job(tmp_path, number, [f"ptq={name}"], reference=full, run=quantized)
    compare_runs(tmp_path)
    assert methods(tmp_path) == ["full precision", "rtn", "gptq"]
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "gptq" in capsys.readouterr().out


def test_rows_of_one_name_are_told_apart_by_what_was_varied(tmp_path):
    for number in range(11):
        overrides = ["data=c4", f"optim.lr={number}"]
        job(tmp_path, number, overrides, run=record("b1.58 frozen", 4.0, bits_per_weight=1.6))
    compare_runs(tmp_path)
    best, *others = [f"b1.58 frozen optim.lr={number}" for number in range(11)]  # 10 after 9
    assert methods(tmp_path) == [f"{best} (best)", *others]


def test_each_run_is_measured_against_its_own_twin(tmp_path):
    for number in range(2):
        twin, frozen = record("dense", 4.0 - number), record("b1.58 frozen", 4.25, bits_per_weight=1.6)
        job(tmp_path, number, [f"optim.lr={number}"], dense__run=twin, run=frozen)
    compare_runs(tmp_path)
    words = ["optim.lr=0", "optim.lr=1 (best)", "optim.lr=0 (best)", "optim.lr=1"]
    names = ["dense", "dense", "b1.58 frozen", "b1.58 frozen"]
    assert methods(tmp_path) == [f"{name} {word}" for name, word in zip(names, words, strict=True)]
    assert column(tmp_path, "gap") == ["—", "—", "+0.2500", "+1.2500"]


def test_failed_jobs_are_listed_with_their_line(tmp_path, capsys):
    job(tmp_path, 0, ["ptq=gptq"], error="expected [a] layer, got none", reference=record("full precision", 3.5))
    job(tmp_path, 1, ["ptq=rtn"], run=record("rtn", 3.6, bits_per_weight=4.0))
    compare_runs(tmp_path)
    said = "0 (ptq=gptq): expected [a] layer, got none"
    assert f"failed: {said}" in capsys.readouterr().out
    assert f"- {said}\n" in (tmp_path / "results.md").read_text()


def test_a_sweep_in_which_nothing_succeeded_lists_its_failures_and_writes_nothing(tmp_path, capsys):
    job(tmp_path, 0, [], error="no")
    compare_runs(tmp_path)
    assert "failed: 0 (no overrides): no" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0"]
    compare_runs(tmp_path / "absent")
    assert capsys.readouterr().out == ""


def test_a_table_is_made_where_no_picture_can_be(tmp_path, capsys):
    job(tmp_path, 0, ["a=1"], run=record("rtn", 3.5, bits_per_weight=4.0))
    job(tmp_path, 1, ["a=2"], run=record("rtn", 3.5, bits_per_weight=4.0, data={"name": "c4"}))
    compare_runs(tmp_path)
    assert "no picture: rtn a=2 and rtn a=1 were evaluated on different tokens" in " ".join(
        capsys.readouterr().out.split()
    )
    assert not (tmp_path / "pareto.png").exists()
    assert len(methods(tmp_path)) == 2


def test_a_damaged_record_leaves_the_other_rows(tmp_path, capsys):
    job(tmp_path, 0, [], run=record("rtn", 3.5, bits_per_weight=4.0))
    job(tmp_path, 1, [])
    (tmp_path / "1" / "run").mkdir()
    (tmp_path / "1" / "run" / "run.json").write_text('{"half":')
    compare_runs(tmp_path)
    assert methods(tmp_path) == ["rtn"]
    assert "1/run/run.json is no run record" in capsys.readouterr().out


def launcher(name: str, jobs: int = -1):
    target = f"hydra_plugins.hydra_joblib_launcher.joblib_launcher.{name}"
    config = OmegaConf.create({"hydra": {"launcher": {"_target_": target, "n_jobs": jobs}}})
    OmegaConf.set_readonly(config, True)  # as Hydra hands it over
    return config


@pytest.mark.parametrize(
    ("free", "cores", "jobs"),
    [(10e9, 8, 5), (10e9, 4, 4), (1e9, 4, 1)],  # memory decides, processors decide, one in any case
)
def test_joblib_runs_as_many_jobs_as_memory_and_processors_hold(monkeypatch, capsys, free, cores, jobs):
    monkeypatch.setattr("bitnet.experiment.estimate.memory_of_a_run", lambda config: 1.9e9)
    monkeypatch.setattr("bitnet.experiment.sweep._free_memory", lambda: free)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    config = launcher("JoblibLauncher")
    limit_parallel_jobs(config)
    assert config.hydra.launcher.n_jobs == jobs
    assert f"{jobs} jobs at once: about 1.9 GB each of {free / 1e9:.1f} GB free" in capsys.readouterr().out


@pytest.mark.parametrize("config", [launcher("JoblibLauncher", 3), launcher("BasicLauncher")])
def test_a_number_of_jobs_that_is_given_stays(monkeypatch, config):
    monkeypatch.setattr("bitnet.experiment.estimate.memory_of_a_run", lambda config: pytest.fail("not to be asked"))
    before = config.hydra.launcher.n_jobs
    limit_parallel_jobs(config)
    assert config.hydra.launcher.n_jobs == before


def test_a_model_trained_on_is_measured_against_the_best_dense_one_of_as_many_tokens(tmp_path):
    for number, (name, nll, tokens) in enumerate([("hf", 3.0, 0), ("dense", 3.2, 500), ("dense", 3.1, 500)]):
        job(tmp_path, number, ["+experiment=dense", f"optim.lr={number}"], run=record(name, nll, train_tokens=tokens))
    quantized = record("q frozen", 3.5, bits_per_weight=2.0, train_tokens=500)
    job(tmp_path, 3, ["+experiment=q", "optim.lr=1"], run=quantized)
    job(tmp_path, 4, ["+experiment=q", "optim.lr=2"], run=dataclasses.replace(quantized, nll=3.4, gap=0.7))
    compare_runs(tmp_path)
    assert methods(tmp_path)[1:3] == ["dense optim.lr=1", "dense optim.lr=2 (best)"]
    assert methods(tmp_path)[3:] == ["q frozen optim.lr=1", "q frozen optim.lr=2 (best)"]
    assert column(tmp_path, "gap")[3:] == ["+0.4000", "+0.7000"]  # one that was measured stays


def test_cells_that_never_ended_are_listed(tmp_path, capsys):
    job(tmp_path, 1, ["ptq=b"], run=record("b", 3.5, bits_per_weight=4.0))
    (tmp_path / "cells.json").write_text(json.dumps({"0": ["ptq=a"], "1": ["ptq=b"]}))
    compare_runs(tmp_path)
    assert "not finished: 0: the same command goes on" in capsys.readouterr().out


def test_importing_the_callback_loads_nothing_heavy():
    probe = "import sys, bitnet.experiment.sweep; print(sorted({'torch', 'matplotlib', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_a_sweep_ends_with_a_table_whether_or_not_a_job_failed(tmp_path, corpus, tiny_settings):
    def sweep(name: str, rates: str) -> subprocess.CompletedProcess[str]:
        settings = [*tiny_settings, f"data.path={corpus}", "export=none", "trainer.max_steps=2", CALLBACK]
        command = [sys.executable, str(ROOT / "train.py"), "-m", *settings]
        environment = {**os.environ, "BITNET_CACHE": str(tmp_path / "cache"), "COLUMNS": "160"}
        return subprocess.run(
            [*command, f"optim.lr={rates}", f"hydra.sweep.dir={name}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = sweep("good", "1e-3,2e-3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("All runs (good)") == 1
    assert {name.removesuffix(" (best)") for name in methods(tmp_path / "good")} == {
        f"bitnet158 {form} optim.lr={rate}" for form in ("latent", "frozen") for rate in ("0.001", "0.002")
    }
    done = sweep("bad", "-1,1e-3")
    assert done.returncode == 1
    assert done.stdout.count("All runs (bad)") == 1
    assert "failed: 0 (" in done.stdout
    assert "optim.lr must be a positive number" in done.stdout
    assert methods(tmp_path / "bad") == ["bitnet158 latent", "bitnet158 frozen"]
