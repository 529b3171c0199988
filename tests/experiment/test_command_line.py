"""The command line from outside: its help page, its refusals, and what importing it costs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet.report import RunRecord

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "conf"


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "BITNET_CACHE": str(cwd / "cache"), "COLUMNS": "100"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_the_help_page_names_every_choice_of_every_group(tmp_path):
    page = train("--help", cwd=tmp_path).stdout
    groups = [folder for folder in CONFIG.iterdir() if folder.is_dir() and folder.name not in ("hydra", "experiment")]
    for group in groups:
        line = re.search(rf"^ +{group.name} +(.*(?:\n {{12,}}.*)*)$", page, re.MULTILINE)  # and lines that continue it
        assert line, group.name
        for file in group.glob("[!_]*.yaml"):
            if not (file.stem == "none" and group.name in ("size", "quantizer", "activation")):  # set by model= alone
                assert re.search(rf"\b{re.escape(file.stem)}\b", line[1]), f"{group.name}={file.stem}"


@pytest.mark.parametrize(
    "code",
    [
        "import bitnet",
        "import sys; sys.argv = ['train.py', '--help']; import runpy; runpy.run_path('train.py', run_name='__main__')",
    ],
)
def test_importing_the_package_or_asking_for_help_loads_nothing_heavy(code):
    probe = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\n"
    probe += (
        "print(sorted({'torch', 'lightning', 'transformers', 'datasets', 'wandb'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr.strip() == "[]"


def test_using_a_layer_loads_torch_and_nothing_of_the_training_stack():
    probe = "import sys, bitnet; bitnet.BitLinear158(4, 2)\n"
    probe += "print(sorted({'torch', 'lightning', 'transformers', 'datasets', 'wandb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['torch']"


@pytest.fixture
def tiny_run(tmp_path, corpus, tiny_settings):
    """Run the command line on a tiny model in ``tmp_path``."""
    return lambda *more: train(*more, *tiny_settings, f"data.path={corpus}", "export=none", cwd=tmp_path)


@pytest.mark.slow
def test_a_compiled_run_learns_what_an_eager_one_learns(tmp_path, tiny_run):
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        done = tiny_run(f"output_dir={name}", f"compile={compiled}", "threads=1")
        assert done.returncode == 0, done.stderr
    eager, compiled = (RunRecord.read(tmp_path / name / "run.json") for name in ("eager", "compiled"))
    assert compiled.nll == pytest.approx(eager.nll, rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_one_model_and_write_one_folder(tmp_path, tiny_run):
    two = ["trainer.accelerator=cpu", "trainer.devices=2", "+trainer.strategy=ddp", "data.validation_blocks=3"]
    done = tiny_run(*two, "threads=1")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    record = RunRecord.read(folder / "run.json")
    assert record.train_tokens == 2 * 6 * 2 * 32
    assert done.stdout.count("Results") == 1


@pytest.mark.slow
def test_a_failed_job_of_a_sweep_does_not_stop_the_others(tmp_path, tiny_run):
    done = tiny_run("-m", "optim.lr=-1,1e-3", "hydra.sweep.dir=sweep")
    assert "optim.lr must be a positive number" in done.stderr
    assert [path.parent.parent.name for path in tmp_path.glob("sweep/*/run/run.json")] == ["1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optim.xyz=1", "error: there is no key 'optim.xyz': did you mean optim.lr?"),
        ("+model.extra=3", "error: unknown key model.extra"),
        ("data.path=/nowhere", "error: data.path"),
        ("output_dir=.", "error: . exists already"),
    ],
)
def test_a_refusal_is_one_line_and_status_1(tmp_path, argument, message):
    done = train("data=c4", argument, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
