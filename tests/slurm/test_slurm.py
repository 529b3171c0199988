"""Sweeps on a real Slurm, which `cluster` starts on this machine: array jobs, a time limit, a requeue, refusals."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cluster import cluster, missing

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
STEPS = 150
SETTINGS = [
    *("size.hidden_size=32", "size.intermediate_size=48", "size.num_hidden_layers=1", "data=text"),
    *("data.block_size=32", "data.batch_size=2", "data.validation_blocks=4", "data.tokenizer.vocab_size=300"),
    *("export=none", "callbacks.samples=null", "callbacks.health=null", "threads=1", "optim.lr=1e-3,2e-3"),
    *(f"trainer.max_steps={STEPS}", "trainer.val_check_interval=50", "callbacks.checkpoints.every_n_steps=10"),
    *("+callbacks.pace._target_=pace.Pace", "trainer.log_every_n_steps=1"),
]
SLURM = [
    *("hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.partition=debug"),
    *("hydra.launcher.max_num_timeout=10", "hydra.launcher.signal_delay_s=60", "hydra.launcher.timeout_min=60"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing()), reason=f"no Slurm on this machine ({', '.join(missing())}): apt-get install slurm-wlm munge"
    ),
    pytest.mark.skipif(
        "BITNET_TEST_SLURM" not in os.environ, reason="takes 10 minutes, most of them Slurm's: set BITNET_TEST_SLURM=1"
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    with cluster(folder):
        yield folder


def start(folder: Path, corpus: Path, sweep: str, seconds: float, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "train.py"), "-m", f"data.path={corpus}", *SETTINGS]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {"BITNET_CACHE": str(folder / "cache"), "PYTHONPATH": path, "COLUMNS": "160"}
    return subprocess.Popen(
        [*command, f"hydra.sweep.dir={sweep}", f"+callbacks.pace.seconds={seconds}", *overrides],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition, seconds: float, what: str):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"no {what} in {seconds:.0f} s"
        time.sleep(1)
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_job_at_its_time_limit_is_requeued_and_ends_in_the_same_bits(slurm, tmp_path, corpus):
    """Two jobs of an array: Slurm warns one before its limit, the other is told by hand, and both go on."""
    process = start(tmp_path, corpus, "limited", 1.0, *SLURM)
    try:
        checkpoints = [tmp_path / "limited" / name / "run/checkpoints/last.ckpt" for name in "01"]
        until(lambda: all(path.exists() for path in checkpoints) or process.poll() is not None, 900, "checkpoint")
        assert process.poll() is None, process.communicate()[0]
        job = subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True).stdout.split()
        assert len(job) == 2
        assert len({each.partition("_")[0] for each in job}) == 1  # one array
        first, second = sorted(job)
        spent = subprocess.run(["squeue", "-h", "-j", first, "-o", "%M"], capture_output=True, text=True).stdout
        minutes = int(spent.strip().split(":")[-2]) + 2  # Slurm counts limits in minutes, and looks twice in one
        subprocess.run(["scontrol", "update", f"JobId={first}", f"TimeLimit={minutes}"], check=True)
        subprocess.run(["scancel", "--signal=USR2", second], check=True)
        pattern = str(tmp_path / "limited/.submitit/*")
        log = lambda job: "".join(path.read_text() for path in Path(pattern).parent.glob(f"{job}/*.out"))  # noqa: E731
        until(lambda: "Exiting gracefully after preemption/timeout" in log(first), 600, "warning of the time limit")
        subprocess.run(["scontrol", "update", f"JobId={first}", "TimeLimit=60"], check=True)
        said, _ = process.communicate(timeout=1500)
    finally:
        process.kill()
    assert process.returncode == 0, said
    for job in (first, second):
        print(log(job))
        assert log(job).count("Caught signal SIGUSR2") == 1
        assert log(job).count("Handing over after this step") == 1
        resumed = [int(number) for number in re.findall(rf"step (\d+)/{STEPS}", log(job))]
        assert len(resumed) < 2 * STEPS  # the second part began where the first ended
    done = start(tmp_path, corpus, "alone", 0.0)
    assert done.communicate(timeout=900)[0] is not None
    assert done.returncode == 0
    for name in "01":
        one, other = (tmp_path / sweep / name / "run" for sweep in ("limited", "alone"))
        assert json.loads((one / "run.json").read_text())["nll"] == json.loads((other / "run.json").read_text())["nll"]
        one, other = weights(one), weights(other)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_partition_that_the_cluster_lacks_is_refused_in_one_line(slurm, tmp_path, corpus):
    said, _ = (process := start(tmp_path, corpus, "s", 0.0, *SLURM, "hydra.launcher.partition=gpu")).communicate()
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "error: Slurm took no job: invalid partition specified: gpu" in said
