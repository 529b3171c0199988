import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from bitnet.errors import InputError
from bitnet.report import RunRecord, git_state, machine, versions


def test_a_record_reads_back_as_it_was_written(make_record, tmp_path):
    record = make_record(bits_per_byte=None, data={"name": "ærlig", "counts": [1, 2]})
    assert RunRecord.read(record.write(tmp_path / "new" / "run.json")) == record


def test_the_file_is_strict_json(make_record, tmp_path):
    path = make_record(nll=None).write(tmp_path / "run.json")
    stored = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert stored["nll"] is None


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"nll": float("nan")}, "nll = nan"),
        ({"perplexity": float("inf")}, "perplexity = inf"),
        ({"config": {"optim": {"betas": [0.9, float("-inf")]}}}, r"config.optim.betas.1 = -inf"),
    ],
)
def test_a_figure_that_is_not_finite_is_refused_by_name(make_record, changes, path):
    with pytest.raises(InputError, match=path):
        make_record(**changes)


def test_a_value_that_json_lacks_is_refused_by_name(make_record):
    with pytest.raises(InputError, match=r"config.device of type device"):
        make_record(config={"device": torch.device("cpu")})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda stored: stored.pop("nll"), r"missing \['nll'\]"),
        (lambda stored: stored.update(colour="red"), r"unknown \['colour'\]"),
        (lambda stored: stored.update(format_version=99), "format 99"),
        (lambda stored: stored.pop("format_version"), "format None"),
    ],
)
def test_a_file_of_other_fields_is_refused(make_record, tmp_path, edit, message):
    path = make_record().write(tmp_path / "run.json")
    stored = json.loads(path.read_text())
    edit(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=message):
        RunRecord.read(path)


def test_a_record_of_the_first_format_is_read_with_nothing_in_the_new_fields(make_record, tmp_path):
    path = make_record(kl=0.5).write(tmp_path / "run.json")
    stored = json.loads(path.read_text())
    new = "claimed_bits nll_interval gap gap_interval quantized_share kl top1_agreement quantize_seconds evaluation"
    for name in [*new.split(), "calibration", "tasks"]:
        del stored[name]
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match="missing"):  # the second format has them all
        RunRecord.read(path)
    path.write_text(json.dumps(stored | {"format_version": 1}))
    assert RunRecord.read(path) == make_record()
    path.write_text(json.dumps(stored | {"format_version": 1, "kl": 0.5}))
    with pytest.raises(InputError, match=r"unknown \['kl'\]"):
        RunRecord.read(path)


def test_the_figures_of_a_comparison_read_back_as_they_were_written(make_record, tmp_path):
    record = make_record(
        claimed_bits=4.0,
        nll_interval=[4.0, 4.5],
        gap=0.25,
        gap_interval=[0.2, 0.3],
        kl=0.2,
        top1_agreement=0.9,
        quantize_seconds=12.5,
        evaluation={"text": "joined", "window": 256, "stride": 256, "predicted_tokens": 249_896},
        calibration={"windows": 128},
        tasks={"arc_easy/acc": 0.5},
    )
    assert RunRecord.read(record.write(tmp_path / "run.json")) == record
    with pytest.raises(InputError, match=r"gap_interval.1 = inf"):
        make_record(gap_interval=[0.0, float("inf")])


@pytest.mark.parametrize("content", ["", '{"nll": 1', "[1, 2]", "\udc80"])
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"run\.json is no run record"):
        RunRecord.read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="found no file"):
        RunRecord.read(tmp_path / "run.json")


def test_a_full_disk_keeps_the_record_that_was_there(make_record, tmp_path, monkeypatch):
    path = make_record(seed=1).write(tmp_path / "run.json")

    def full(self: Path, *args: object, **kwargs: object) -> int:
        with self.open("wb") as file:
            file.write(b'{"half":')
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        make_record(seed=2).write(path)
    assert RunRecord.read(path).seed == 1
    assert os.listdir(tmp_path) == ["run.json"]


def test_git_state_names_the_commit_and_sees_changes(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    sha = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == (sha, False)
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == (sha, True)


def test_git_state_is_none_outside_a_repository_and_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == (None, None)


def test_machine_and_versions_fit_into_a_record(make_record):
    record = make_record(machine=machine(), versions=versions())
    assert record.machine["threads"] == torch.get_num_threads()
    assert record.machine["cpu"]
    assert record.versions["torch"].startswith("2.")
