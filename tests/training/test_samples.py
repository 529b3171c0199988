"""Sample text: written, stored, repeatable, and of no influence on training."""

import pytest
import torch
from toy_training import ToyData, ToyLanguageModel, toy_module, toy_trainer

from bitnet.errors import InputError
from bitnet.training import WriteSamples, generate


class _Letters:
    """One letter a token; 0 starts a document and 1 ends it."""

    bos_token_id, eos_token_id = 0, 1

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) - ord("a") + 2 for letter in text]

    def decode(self, token_ids):
        return "".join(chr(token + ord("a") - 2) if token > 1 else "?" for token in token_ids)


def _fit(root, *callbacks):
    data = ToyData()
    data.tokenizer = _Letters()
    torch.manual_seed(1)
    module = toy_module(4, model=ToyLanguageModel(dropout=0.2))
    toy_trainer(root, 4, callbacks, limit_val_batches=1, val_check_interval=2).fit(module, datamodule=data)
    return module


def _generate(model, seed=0, **options):
    options = {"max_new_tokens": 20, "temperature": 1.0, "end": None} | options
    return generate(model, [0, 5], generator=torch.Generator().manual_seed(seed), **options)


def test_samples_are_printed_and_stored_at_each_validation(tmp_path, capsys):
    _fit(tmp_path, WriteSamples(["hello", "a"], max_new_tokens=4))
    text = (tmp_path / "samples.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Step 2", "## Step 4"]
    assert text.count(">     hello") == 2
    assert capsys.readouterr().out.count("  | hello") == 2


def test_training_is_the_same_with_and_without_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("bitnet.training.random_state.restore_random_state", lambda state: None)  # it would hide draws
    plain = _fit(tmp_path / "plain").state_dict()
    sampled = _fit(tmp_path / "sampled", WriteSamples(["hello"])).state_dict()
    assert all(torch.equal(plain[name], sampled[name]) for name in plain)


def test_sampling_leaves_the_global_random_state_alone():
    model = ToyLanguageModel().eval()
    before = torch.get_rng_state()
    _generate(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_gives_one_text_and_another_seed_another():
    model = ToyLanguageModel().eval()
    assert _generate(model, seed=1) == _generate(model, seed=1) != _generate(model, seed=2)


def test_temperature_zero_takes_the_most_likely_token():
    model = ToyLanguageModel().eval()
    new = _generate(model, temperature=0)
    text = torch.tensor([[0, 5, *new]])
    assert new == model(text).logits[0, 1:-1].argmax(-1).tolist()


def test_the_end_token_ends_the_text():
    model = ToyLanguageModel().eval()
    with torch.no_grad():
        model.head.bias[1] = 1e4
    assert _generate(model, end=1) == []


def test_an_empty_prompt_needs_a_start_token(tmp_path):
    class NoStart(_Letters):
        bos_token_id = None

    data = ToyData()
    data.tokenizer = NoStart()
    with pytest.raises(InputError, match="empty prompt"):
        toy_trainer(tmp_path, 2, [WriteSamples()], limit_val_batches=1, val_check_interval=2).fit(
            toy_module(), datamodule=data
        )


@pytest.mark.parametrize("knobs", [{"prompts": []}, {"max_new_tokens": 0}, {"temperature": -1}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(InputError, match="expected prompts"):
        WriteSamples(**knobs)
