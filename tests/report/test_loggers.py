import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from bitnet.errors import InputError
from bitnet.report import make_loggers, tensorboard_logger, wandb_logger

CONF = Path(__file__).parents[2] / "conf"

# A run as the trainer logs it: the real logger, in a process of its own (W&B keeps state for the whole process).
RUN = """
import sys
from pathlib import Path
from bitnet.report import close_loggers, make_loggers, wandb_logger
for name in sys.argv[2:]:
    made = make_loggers({"wandb": wandb_logger, "tensorboard": None}, Path(sys.argv[1]) / name)
    for logger in made:
        logger.log_hyperparams({"optim": {"lr": 0.002}})
        logger.log_metrics({"train/loss": 5.25}, 9)
        logger.log_metrics({"train/loss": 4.75}, 19)
    close_loggers(made)
"""


def environment(home: Path, **settings: str) -> dict[str, str]:
    """No key, no netrc, no mode set: the machine of a stranger."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    return {**kept, "HOME": str(home), **settings}


def log_run(tmp_path: Path, *names: str, **settings: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "runs"), *names],
        env=environment(tmp_path, **settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def inspected(directory: Path) -> list[dict]:
    """What W&B's own reader finds in an offline run."""
    program = Path(sys.executable).parent / "wandb"
    done = subprocess.run(
        [program, "leet", "inspect", "--json", directory], capture_output=True, text=True, timeout=60, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]


def logged_losses(directory: Path) -> list[float]:
    items = [
        item
        for record in inspected(directory)
        if record["type"] == "history"
        for item in record["history"]["item"].items()
    ]
    return [float(value) for key, value in items if key == "train/loss"]


@pytest.mark.slow
def test_wandb_without_a_key_writes_each_run_offline_and_says_how_to_upload_it(tmp_path):
    said = log_run(tmp_path, "dense", "b158")
    for name in ("dense", "b158"):
        (directory,) = (tmp_path / "runs" / name / "wandb").glob("offline-run-*")
        assert logged_losses(directory) == [5.25, 4.75]
        assert f"wandb sync {tmp_path}/runs/{name}/wandb/offline-run-*" in said
    assert "no key" in said


@pytest.mark.parametrize(
    ("settings", "offline", "mode", "reason"),
    [
        ({}, False, "offline", "no key"),
        ({"WANDB_MODE": "online"}, False, "offline", "no key"),
        ({"WANDB_API_KEY": "k" * 40}, True, "offline", "as configured"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, False, "offline", "WANDB_MODE says so"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, False, "offline", "cannot be reached"),
        ({"WANDB_MODE": "disabled"}, False, "disabled", ""),
    ],
)
def test_the_mode_is_settled_before_wandb_starts(tmp_path, monkeypatch, capsys, settings, offline, mode, reason):
    monkeypatch.setattr(os, "environ", environment(tmp_path, **settings))
    logger = wandb_logger(tmp_path / "run", offline=offline)
    assert logger._wandb_init["mode"] == mode
    assert reason in capsys.readouterr().out


def test_a_key_in_the_netrc_file_counts(tmp_path, monkeypatch, capsys):
    netrc = tmp_path / "keys"
    netrc.write_text("machine 127.0.0.1:9\n  login user\n  password kkk\n")
    netrc.chmod(0o600)
    settings = {"NETRC": str(netrc), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    monkeypatch.setattr(os, "environ", environment(tmp_path, **settings))
    wandb_logger(tmp_path / "run")
    assert "cannot be reached" in capsys.readouterr().out  # past the question of a key
    netrc.write_text("machine 127.0.0.1:9 nonsense\n")
    with pytest.raises(InputError, match="keys was to be searched"):
        wandb_logger(tmp_path / "run")


def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("bitnet.report.loggers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "bitnet-qat\[wandb\]"'):
        wandb_logger(tmp_path)
    with pytest.raises(InputError, match=r'pip install "bitnet-qat\[tensorboard\]"'):
        tensorboard_logger(tmp_path)


def test_the_csv_file_is_written_at_every_call_and_a_second_start_keeps_the_first(tmp_path):
    for start in range(2):
        (logger,) = make_loggers({}, tmp_path)
        logger.log_metrics({"train/loss": 5.0 + start}, 0)
        logger.log_metrics({"val/loss": 6.0 + start}, 1)
        with (tmp_path / f"csv/version_{start}/metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["val/loss"] for row in rows] == ["", str(6.0 + start)]


def test_an_entry_switched_off_makes_no_logger(tmp_path):
    made = make_loggers({"wandb": None, "tensorboard": tensorboard_logger}, tmp_path)
    assert [type(logger).__name__ for logger in made] == ["CSVLogger", "TensorBoardLogger"]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("csv", []),
        ("tensorboard", ["tensorboard"]),
        ("wandb", ["wandb"]),
        ("all", ["tensorboard", "wandb"]),
    ],
)
def test_every_file_of_the_logger_group_names_functions_of_the_run_folder(tmp_path, choice, names):
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        factories = instantiate(compose("config", [f"logger={choice}"]).logger)
    assert sorted(factories) == names
    made = make_loggers(factories, tmp_path)
    assert len(made) == 1 + len(names)
