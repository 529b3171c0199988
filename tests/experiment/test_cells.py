import json
import multiprocessing
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from bitnet.errors import InputError
from bitnet.experiment.cells import cell_name, in_use, is_finished, refuse_other_settings


def settings(**changes) -> DictConfig:
    fixed = {"optim": {"lr": 1e-3}, "trainer": {"max_steps": 600}, "data": {"path": "/c4", "again": "${data.path}"}}
    return OmegaConf.create({**fixed, "export": {}, "threads": None, "output_dir": None, **changes})


def cell(folder: Path, cfg: DictConfig, error: str | None = None) -> Path:
    (folder / "run").mkdir(parents=True)
    OmegaConf.save(cfg, folder / "run" / "config.yaml")
    (folder / "run" / "run.json").write_text("{}")
    (folder / "job.json").write_text(json.dumps({"overrides": [], "error": error}))
    return folder


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["+experiment=qat158", "optim.lr=0.001"], "qat158_lr-0.001"),
        (["+experiment=ptq", "ptq=gptq", "ptq.bits=3"], "ptq_gptq_bits-3"),
        (["data.path=/a b/*.txt", "~callbacks.health"], "path--a-b-.txt_health"),
        (["optim.betas=[0.9,0.95]"], "betas--0.9-0.95"),
    ],
)
def test_a_cell_is_called_by_what_it_varies_in_letters_that_need_no_quotes(overrides, name):
    assert cell_name(overrides) == name


def test_a_cell_is_finished_once_it_ended_well_with_its_record(tmp_path):
    assert not is_finished(tmp_path / "new", settings())
    assert is_finished(cell(tmp_path / "good", settings()), settings())
    assert not is_finished(cell(tmp_path / "failed", settings(), error="no"), settings())
    started = cell(tmp_path / "started", settings())
    (started / "run" / "run.json").unlink()
    assert not is_finished(started, settings())
    killed = cell(tmp_path / "killed", settings())
    (killed / "job.json").unlink()
    assert not is_finished(killed, settings())


def test_a_cell_that_is_to_export_more_is_not_finished(tmp_path):
    folder = cell(tmp_path, settings())
    more = settings(export={"packed": {"layout": "i2"}})
    refuse_other_settings(folder / "run", more)
    assert not is_finished(folder, more)


def test_other_settings_are_refused_with_their_names(tmp_path):
    folder = cell(tmp_path / "a", settings())
    with pytest.raises(InputError, match=r"trainer\.max_steps was 600, is 900: .* remove .*a to run it again"):
        is_finished(folder, settings(trainer={"max_steps": 900}))
    with pytest.raises(InputError, match=r"distill\.teacher was absent, is /t:"):
        is_finished(folder, settings(distill={"teacher": "/t"}))
    with pytest.raises(InputError, match=r"data\.path was /c4, is /d; data\.again was /c4, is /d:"):
        is_finished(folder, settings(data={"path": "/d", "again": "${data.path}"}))


def test_what_changes_no_result_may_be_other(tmp_path):
    folder = cell(tmp_path, settings())
    assert is_finished(folder, settings(threads=2, output_dir="x"))


def test_an_option_that_an_older_version_lacks_is_off_there(tmp_path):
    folder = cell(tmp_path, settings())
    assert is_finished(folder, settings(lora={}, init=None))


def _hold(folder: Path, held, done) -> None:
    with in_use(folder):
        held.set()
        done.wait(60)


def test_two_processes_do_not_work_in_one_cell_and_a_dead_one_lets_go(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, done))
    process.start()
    assert held.wait(60)
    with pytest.raises(InputError, match="another process is at work in"), in_use(tmp_path):
        pass
    process.kill()
    process.join()
    with in_use(tmp_path), pytest.raises(InputError, match="another process"), in_use(tmp_path):
        pass
    with in_use(tmp_path):
        pass
