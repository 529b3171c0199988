"""A teacher's logits on disk."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from toy_training import VOCABULARY, ToyData, toy_module, toy_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet import BitLinear158, InputError, convert
from bitnet.training import AttentionRelations, Distillation, LastAndBest, LogitKL, TeacherCache
from bitnet.training.distill import Seen
from bitnet.training.teacher_cache import TopLogProbs, fingerprint

IDS = torch.randint(0, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))


def llama(seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            tie_word_embeddings=False,
        )
    )
    for parameter in model.parameters():  # logits that are not all alike
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def student():
    model = llama(3)
    convert(model, BitLinear158.from_linear)
    return model.train()


def distillation(folder, temperature=1.0, seed=5, **options):
    cache = None if folder is None else TeacherCache(directory=folder, **options)
    return Distillation(llama(seed), logits=LogitKL(temperature=temperature), cache=cache)


def term(distilled, model=None, ids=IDS):
    """The divergence of one batch, computed as a training step does."""
    logits = (model or student())(ids).logits
    return distilled.losses(logits, {"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))["logits"]


def answers_in(folder):
    return sorted(folder.glob("*/*.safetensors"))


def refusing(distilled):
    """The same, with a teacher that must not be asked."""

    def refuse(*arguments, **named):
        raise AssertionError("the teacher was asked")

    distilled.teacher.forward = refuse
    return distilled


def fitted(root, distilled, until=6, resume=None):
    module = toy_module(6, model=student(), distillation=distilled)
    module.log_dict = lambda figures: None
    trainer = toy_trainer(root, until, [LastAndBest()], enable_checkpointing=True)
    trainer.fit(module, datamodule=ToyData(), ckpt_path=resume)
    return module.model.state_dict()


def test_in_float32_training_ends_in_the_same_bits_as_without_a_cache(tmp_path):
    plain = fitted(tmp_path / "a", distillation(None))
    writing = fitted(tmp_path / "b", distillation(tmp_path / "cache"))
    assert len(answers_in(tmp_path / "cache")) == 6
    reading = fitted(tmp_path / "c", refusing(distillation(tmp_path / "cache")))
    for name, value in plain.items():
        assert torch.equal(value, writing[name])
        assert torch.equal(value, reading[name])


@pytest.mark.parametrize("options", [{"values": "bfloat16"}, {"top": 4}, {"top": 4, "values": "float16"}])
def test_what_is_used_is_what_was_stored_whoever_fills_the_cache(tmp_path, options):
    written = term(distillation(tmp_path / "cache", **options))
    read = term(refusing(distillation(tmp_path / "cache", **options)))
    assert torch.equal(written, read)


def test_a_run_that_was_stopped_goes_on_with_what_is_there(tmp_path):
    whole = fitted(tmp_path / "a", distillation(tmp_path / "whole", top=4, values="bfloat16"))
    options = {"top": 4, "values": "bfloat16"}
    fitted(tmp_path / "b", distillation(tmp_path / "cache", **options), until=3)
    last = next((tmp_path / "b").rglob("last.ckpt"))
    resumed = fitted(tmp_path / "b", distillation(tmp_path / "cache", **options), resume=last)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_top_tokens_give_the_divergence_of_their_outcomes_and_of_all_others_together(tmp_path, temperature):
    model = student()
    found = term(distillation(tmp_path / "cache", temperature, top=5), model)
    ours, theirs = (F.softmax(each(IDS).logits.double() / temperature, -1) for each in (model, llama(5)))
    ids = theirs.topk(5).indices
    pairs = [torch.cat([p.gather(-1, ids), 1 - p.gather(-1, ids).sum(-1, keepdim=True)], -1) for p in (theirs, ours)]
    expected = (pairs[0] * (pairs[0] / pairs[1]).log()).sum(-1).mean() * temperature**2
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert found < term(distillation(None, temperature), model)


def test_all_but_one_token_and_the_rest_are_the_whole_divergence(tmp_path):
    model = student()
    whole = term(distillation(None), model)
    torch.testing.assert_close(term(distillation(tmp_path / "c", top=VOCABULARY - 1), model), whole)


def test_the_students_gradient_is_that_of_the_divergence(tmp_path):
    logits = torch.randn(2, 3, 9, dtype=torch.float32, requires_grad=True)
    teacher = TopLogProbs.of(torch.randn(2, 3, 9), 8, 1.0)
    loss = LogitKL().loss(Seen(logits, {}), Seen(teacher, {}), torch.ones(2, 3, dtype=torch.bool))
    (found,) = torch.autograd.grad(loss, logits)
    p = torch.zeros(2, 3, 9).scatter(-1, teacher.ids, teacher.values.exp())
    p += (p == 0) * teacher.rest.exp()[..., None]
    torch.testing.assert_close(found, (logits.softmax(-1) - p).detach() / 6, rtol=1e-4, atol=1e-6)


def test_sixteen_bits_round_each_logit_once(tmp_path):
    term(distillation(tmp_path / "cache", values="bfloat16"))
    stored = load_file(answers_in(tmp_path / "cache")[0])["logits"]
    with torch.no_grad():
        assert torch.equal(stored, llama(5)(IDS).logits.bfloat16())


def test_other_ids_positions_and_precisions_are_other_batches(tmp_path):
    distilled, model = distillation(tmp_path / "cache"), student()
    predicted = torch.ones_like(IDS, dtype=torch.bool)
    for inputs in ({"input_ids": IDS}, {"input_ids": IDS.flip(0)}, {"input_ids": IDS, "position_ids": IDS * 0}):
        distilled.losses(model(IDS).logits, inputs, predicted)
    with torch.autocast("cpu", torch.bfloat16):
        distilled.losses(model(IDS).logits, {"input_ids": IDS}, predicted)
    assert len(answers_in(tmp_path / "cache")) == 4


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_answer_is_said_to_be_and_written_anew(tmp_path, damage, capsys):
    before = term(distillation(tmp_path / "cache"))
    (path,) = answers_in(tmp_path / "cache")
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[:-100])
    elif damage == "flipped":
        path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        save_file({"logits": torch.zeros(1, 2, 3)}, path)
    assert torch.equal(term(distillation(tmp_path / "cache")), before)
    assert "is damaged: asking the teacher again" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_two_runs_fill_one_folder(tmp_path):
    one, other = distillation(tmp_path / "cache"), distillation(tmp_path / "cache")
    assert torch.equal(term(one), term(refusing(other)))
    assert torch.equal(term(other, ids=IDS + 0), term(one))


@pytest.mark.parametrize("options", [{"seed": 6}, {"values": "bfloat16"}, {"top": 3}], ids=["teacher", "values", "top"])
def test_a_folder_of_another_teacher_or_form_is_refused(tmp_path, options):
    distillation(tmp_path / "cache")
    with pytest.raises(
        InputError, match=r"holds answers of another teacher or in another form \(.*(teacher|values|top) differ"
    ):
        distillation(tmp_path / "cache", **options)


def test_a_temperature_matters_to_the_top_tokens_alone(tmp_path):
    distillation(tmp_path / "all", 1.0)
    distillation(tmp_path / "all", 2.0)
    distillation(tmp_path / "top", 1.0, top=3)
    with pytest.raises(InputError, match="temperature differ"):
        distillation(tmp_path / "top", 2.0, top=3)


def test_a_folder_whose_identity_is_damaged_is_refused(tmp_path):
    distillation(tmp_path / "cache")
    (tmp_path / "cache" / "teacher.json").write_text("{")
    with pytest.raises(InputError, match="delete the folder"):
        distillation(tmp_path / "cache")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "answers"):
        with pytest.raises(
            InputError, match=r"distill\.cache\.directory must be a folder that can be written, got .*file"
        ):
            distillation(path)


def test_a_run_that_the_limit_or_the_disk_does_not_hold_is_refused_before_it_begins(tmp_path, monkeypatch):
    size = 24 * VOCABULARY * 4
    distilled = distillation(tmp_path / "cache", limit=3 * size)
    distilled.reserve(3, 24)
    term(distilled)
    distilled.reserve(3, 24)  # one of them is there
    with pytest.raises(InputError, match=r"distill.cache.limit leaves"):
        distilled.reserve(4, 24)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**9))
    with pytest.raises(InputError, match=r"the disk leaves 0.0 MB: set distill.cache.top=64"):
        distilled.reserve(3, 24)


def test_a_folder_does_not_grow_beyond_its_limit(tmp_path):
    distilled = distillation(tmp_path / "cache", limit=24 * VOCABULARY * 4)
    term(distilled)
    with pytest.raises(InputError, match=r"has grown to distill.cache.limit"):
        term(distilled, ids=IDS.flip(0))


def test_a_full_disk_is_said_in_one_line_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bitnet.training.teacher_cache.save_file", full)
    with pytest.raises(InputError, match=r"is full: free space, or set distill.cache.directory"):
        term(distillation(tmp_path / "cache"))
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["teacher.json"]


def test_logits_that_do_not_fit_into_float16_are_refused(tmp_path):
    distilled = distillation(tmp_path / "cache", values="float16")
    distilled.teacher.lm_head.weight.data *= 1e6
    with pytest.raises(InputError, match=r"not finite in float16: set distill.cache.values=float32"):
        term(distilled)


def test_hidden_states_are_not_kept(tmp_path):
    cache = TeacherCache(directory=tmp_path)
    for terms in ({"relations": AttentionRelations()}, {"logits": LogitKL(), "relations": AttentionRelations()}):
        with pytest.raises(InputError, match=r"keeps logits alone: leave out distill.hidden and distill.relations"):
            Distillation(llama(), cache=cache, **terms)


def test_without_a_folder_nothing_is_kept():
    assert torch.equal(term(Distillation(llama(5), logits=LogitKL(), cache=TeacherCache())), term(distillation(None)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "int8"}, r"distill.cache.values must be one of float32, bfloat16, float16"),
        ({"top": 0}, r"distill.cache.top must be a positive whole number"),
        ({"limit": -1}, r"distill.cache.limit must be a positive number"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        TeacherCache(**options)


def test_more_top_tokens_than_there_are_are_refused(tmp_path):
    with pytest.raises(InputError, match=rf"must be below the vocabulary's {VOCABULARY} tokens"):
        distillation(tmp_path / "cache", top=VOCABULARY)


def test_a_fingerprint_is_of_the_weights_and_the_config():
    model, base = llama(5), fingerprint(llama(5))
    assert fingerprint(model) == base
    model.config.rms_norm_eps = 0.5
    assert fingerprint(model) != base
    assert fingerprint(llama(5).bfloat16()) != base
    other = llama(5)
    other.lm_head.weight.data[3, 3] += 1e-6
    assert fingerprint(other) != base
