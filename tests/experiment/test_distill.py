"""A run with a teacher: from a folder to a record, and the refusal of one with other tokens."""

import json

import pytest

from bitnet.errors import InputError
from bitnet.experiment.run import run


@pytest.fixture
def teacher(tiny, tmp_path):
    """The folder of a dense model, its tokenizer in it."""
    run(tiny("model=dense", "export=hf", "trainer.max_steps=2", f"output_dir={tmp_path / 'teacher'}"))
    return tmp_path / "teacher" / "hf"


def started_from(teacher):
    return ["size=none", f"model.path={teacher}", f"data.tokenizer.path={teacher}"]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_student_learns_from_the_model_it_started_as(tiny, teacher, tmp_path):
    records = run(tiny(*started_from(teacher), "distill=bitdistill", "export=packed"))
    assert [record.method for record in records] == ["bitnet158 latent", "bitnet158 frozen"]
    header = next((tmp_path / "run" / "csv").glob("*/metrics.csv")).read_text().splitlines()[0]
    assert {"train/distill_logits", "train/distill_relations", "train/loss"} <= set(header.split(","))
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["distill"]["teacher"] == str(teacher)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_teacher_with_another_vocabulary_is_refused(tiny, teacher):
    with pytest.raises(
        InputError, match=r"another vocabulary than the data \(300 tokens, 280 here\): use the teacher's"
    ):
        run(tiny("distill=logits", f"distill.teacher={teacher}", "data.tokenizer.vocab_size=280"))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_second_run_reads_the_teachers_answers(tiny, teacher, tmp_path):
    options = [*started_from(teacher), "distill=logits", f"distill.cache.directory={tmp_path / 'answers'}"]
    options += ["export=packed", "trainer.max_steps=3"]
    first = run(tiny(*options, "distill.cache.top=16"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "answers").rglob("*.safetensors")}
    assert len(files) == 3
    second = run(tiny(*options, "distill.cache.top=16", f"output_dir={tmp_path / 'again'}"))
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert [record.nll for record in first] == [record.nll for record in second]


def test_a_cache_that_the_run_would_outgrow_is_refused_before_it_begins(tiny, teacher, tmp_path):
    cache = [f"distill.cache.directory={tmp_path / 'answers'}", "distill.cache.limit=1e5"]
    with pytest.raises(InputError, match=r"the teacher's answers to 6 batches of 64 tokens need 0.5 MB more"):
        run(tiny(*started_from(teacher), "distill=logits", *cache))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_teacher_that_cannot_teach_is_refused_before_the_weights_to_start_from_are_found(
    tiny, teacher, monkeypatch, tmp_path
):
    monkeypatch.setattr("bitnet.experiment.run.start_from", lambda *_: pytest.fail("it was too late"))
    with pytest.raises(InputError, match=r"distill\.teacher must be a Hugging Face directory"):
        run(tiny(*started_from(teacher), "init=mse", "distill=logits", f"distill.teacher={tmp_path / 'none'}"))
    with pytest.raises(InputError, match=r"layers are -2 \.\.\. 1 in .*, got 7"):
        run(tiny(*started_from(teacher), "init=mse", "distill=bitdistill", "distill.relations.layer=7"))
