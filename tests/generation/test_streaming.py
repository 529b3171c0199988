"""A prompt gives pieces of text; together they are the text of the new tokens."""

from itertools import islice

import pytest
import torch
from text_models import byte_fallback, byte_level, quantized, tiny
from transformers import PreTrainedModel

from bitnet.errors import InputError
from bitnet.generation import CachedModel, Sampling, chat_ids, complete, prompt_ids, stream

TOKENIZER = byte_level()
PROMPT = "Die Katze 猫🙂"


class Parrot:
    """Makes a model answer with given tokens, whatever it reads; keeps count of what it was asked to read."""

    def __init__(self, model: PreTrainedModel, answer: list[int], prompt: int) -> None:
        self.read, self._answer, self._prompt = [], answer, prompt
        model.register_forward_hook(self._speak, with_kwargs=True)

    def _speak(self, model, arguments, options, output):
        self.read += options["input_ids"][0].tolist()
        place = len(self.read) - self._prompt
        output.logits = torch.full_like(output.logits, -9.0)
        output.logits[..., self._answer[min(place, len(self._answer) - 1)]] = 9.0
        return output


def saying(text: str | list[int], prompt: str = "a", **options) -> tuple[PreTrainedModel, Parrot]:
    """A model that continues any prompt by ``text`` and ends."""
    ids = TOKENIZER.encode(text, add_special_tokens=False) if isinstance(text, str) else text
    model = tiny("llama", **options)
    return model, Parrot(model, [*ids, TOKENIZER.eos_token_id], len(prompt_ids(TOKENIZER, prompt)))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 50}, {"top_p": 0.95}])
def test_the_pieces_together_are_the_text_of_all_tokens(options):
    """Random bytes, most of them no characters: the hardest case."""
    model = quantized("bitnet")
    cached = CachedModel(model)
    pieces = list(stream(model, TOKENIZER, "Die Katze", Sampling(**options, max_new_tokens=25), cached=cached))
    ids = prompt_ids(TOKENIZER, "Die Katze")
    assert len(cached.ids) == len(ids) + 24  # the last token is not read
    text = TOKENIZER.decode(cached.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ("Die Katze" + "".join(pieces)).startswith(text.rstrip("�"))
    assert "" not in pieces


def test_text_with_characters_of_several_tokens_is_said_in_whole_characters():
    text = " schläft. 猫坐在屋顶上。 🙂🐈‍⬛ naïve"
    model, parrot = saying(text, PROMPT)
    pieces = stream(model, TOKENIZER, PROMPT, Sampling(temperature=0))
    found = list(pieces)
    assert "".join(found) == text
    assert not any("�" in piece for piece in found)
    assert len(found) > 10
    assert pieces.statistics.finish == "end"
    assert parrot.read == [*prompt_ids(TOKENIZER, PROMPT), *TOKENIZER.encode(text, add_special_tokens=False)]


def test_the_first_piece_comes_before_the_second_token_is_computed():
    model, parrot = saying("abc")
    next(stream(model, TOKENIZER, "a", Sampling(temperature=0)))
    assert len(parrot.read) == len(prompt_ids(TOKENIZER, "a"))


def test_a_stop_text_split_over_tokens_ends_the_text_before_it():
    model, parrot = saying("one\n\nUser: two")
    result = complete(model, TOKENIZER, "a", Sampling(temperature=0, stop=("\n\nUser:",)))
    assert (result.text, result.statistics.finish) == ("one", "stop")
    assert len(parrot.read) < len(TOKENIZER.encode("a") + TOKENIZER.encode("one\n\nUser: two"))


def test_what_only_began_like_a_stop_text_is_said_at_the_end():
    assert (
        complete(saying("one\n\nUs")[0], TOKENIZER, "a", Sampling(temperature=0, stop=("\n\nUser",))).text
        == "one\n\nUs"
    )


def test_an_open_character_at_the_end_is_said_as_what_it_is():
    ids = TOKENIZER.encode("x𝄞", add_special_tokens=False)[:-1]
    result = complete(saying(ids)[0], TOKENIZER, "a", Sampling(temperature=0))
    assert result.text == TOKENIZER.decode(ids) == "x�"


def test_a_special_token_can_be_a_stop_text():
    end = TOKENIZER.convert_tokens_to_ids("<|end|>")
    ids = [*TOKENIZER.encode("ab", add_special_tokens=False), end, end]
    assert (
        complete(saying(ids)[0], TOKENIZER, "a", Sampling(temperature=0, stop=("<|end|>",))).statistics.new_tokens == 2
    )
    assert complete(saying(ids)[0], TOKENIZER, "a", Sampling(temperature=0)).statistics.new_tokens == 4


@pytest.mark.parametrize("more", [7, [5, 7]])
def test_end_tokens_of_the_generation_settings_end_the_text_as_well(more):
    model, _ = saying([66, 67, 7, 68])
    model.generation_config.eos_token_id = more
    assert complete(model, TOKENIZER, "a", Sampling(temperature=0)).statistics.new_tokens == 2


def test_the_number_of_new_tokens_is_kept_to():
    result = complete(saying("abcdefgh")[0], TOKENIZER, "a", Sampling(temperature=0, max_new_tokens=3))
    assert (result.text, result.statistics.finish, result.statistics.new_tokens) == ("abc", "length", 3)


def test_a_full_context_ends_the_text():
    model, parrot = saying("XYZXYZXYZXYZ", context=10)
    result = complete(model, TOKENIZER, "a", Sampling(temperature=0))
    assert (result.text, result.statistics.finish) == ("XYZXYZXY", "context")  # <s>, "a" and eight letters
    assert len(parrot.read) == 9


def test_a_prompt_that_fills_the_context_is_refused():
    with pytest.raises(InputError, match=r"10 tokens and the model's context is 10: shorten it to at most 9"):
        stream(tiny("llama", context=10), TOKENIZER, "XXXXXXXXX")
    assert complete(tiny("llama", context=10), TOKENIZER, "XXXXXXXX").statistics.new_tokens <= 1


def test_a_token_without_an_embedding_is_refused():
    with pytest.raises(InputError, match="299 and the model 128 embeddings"):
        stream(tiny("llama", vocabulary=128), TOKENIZER, [1, 299])
    with pytest.raises(InputError, match="token -1"):
        stream(tiny("llama"), TOKENIZER, [1, -1])
    with pytest.raises(InputError, match="at least one token"):
        stream(tiny("llama"), TOKENIZER, [])


def test_rows_of_the_model_that_the_tokenizer_does_not_know_are_never_said():
    model = tiny("llama", vocabulary=400)
    with torch.no_grad():
        model.lm_head.weight[300:] *= 100
    cached = CachedModel(model)
    list(stream(model, TOKENIZER, "a", Sampling(temperature=1, max_new_tokens=30), cached=cached))
    assert max(cached.ids) < 300


def test_an_empty_prompt_starts_a_document():
    assert prompt_ids(TOKENIZER, "") == [TOKENIZER.bos_token_id]
    assert prompt_ids(byte_fallback(), "") == [
        1
    ]  # its own marks have none: the start of a document is meant all the same
    with pytest.raises(InputError, match="empty prompt"):
        prompt_ids(byte_level(start=False), "")


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(InputError, match="no text, at character 2"):
        prompt_ids(TOKENIZER, "ab\udcff")
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InputError, match="no text, at character 1"):
        chat_ids(tokenizer, [{"role": "user", "content": "a\udcff"}])


def test_a_mark_for_the_end_is_not_put_behind_the_prompt():
    tokenizer = byte_level(end=True)
    assert tokenizer.encode("ab")[-1] == tokenizer.eos_token_id
    assert prompt_ids(tokenizer, "ab") == tokenizer.encode("ab")[:-1]
    assert prompt_ids(byte_level(start=False, end=True), "ab") == tokenizer.encode("ab")[1:-1]


def test_a_seed_repeats_its_text_and_leaves_the_global_random_state_alone():
    model, before = quantized("bitnet"), torch.get_rng_state()
    texts = [complete(model, TOKENIZER, "a", Sampling(seed=seed, max_new_tokens=9)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before_when_the_text_ended_or_was_dropped(training):
    model = tiny("llama").train(training)
    model.config.attention_dropout = 0.5
    complete(model, TOKENIZER, "a", Sampling(max_new_tokens=3))
    assert model.training == training
    pieces = stream(model, TOKENIZER, "a", Sampling(max_new_tokens=30))
    list(islice(pieces, 2))
    assert not model.training
    assert pieces.statistics.finish == "interrupted"
    del pieces
    assert model.training == training


def test_a_model_can_be_trained_after_it_generated():
    model = tiny("llama")
    complete(model, TOKENIZER, "a", Sampling(max_new_tokens=3))
    ids = torch.randint(300, (1, 8))
    model.train()(input_ids=ids, labels=ids).loss.backward()


def test_figures_count_tokens_and_seconds():
    model, _ = saying("XYZXYZ")
    statistics = complete(model, TOKENIZER, "a", Sampling(temperature=0)).statistics
    assert (statistics.prompt_tokens, statistics.new_tokens) == (2, 6)
    assert statistics.tokens_per_second == 5 / statistics.decode_seconds > 0
    assert statistics.prefill_tokens_per_second == 2 / statistics.prefill_seconds > 0
    nothing = complete(saying([])[0], TOKENIZER, "a", Sampling(temperature=0))
    assert (nothing.text, nothing.statistics.new_tokens, nothing.statistics.tokens_per_second) == ("", 0, 0)


def test_a_cache_of_another_model_is_refused():
    with pytest.raises(InputError, match="another model"):
        stream(tiny("llama"), TOKENIZER, "a", cached=CachedModel(tiny("llama")))


@pytest.mark.parametrize("between", ["stream", "read", "keep"])
def test_two_texts_at_once_on_one_cache_are_refused(between):
    model = tiny("llama")
    cached = CachedModel(model)
    one = stream(model, TOKENIZER, "a", Sampling(max_new_tokens=30), cached=cached)
    next(one)
    if between == "stream":
        two = stream(model, TOKENIZER, "Die Katze", Sampling(max_new_tokens=5), cached=cached)
        next(two)
    elif between == "read":
        cached.read([7])
    else:
        cached.keep([1])
    with pytest.raises(InputError, match="another text has used this CachedModel"):
        list(one)
    if between == "stream":  # the later one goes on
        alone = stream(model, TOKENIZER, "Die Katze", Sampling(max_new_tokens=5))
        next(alone)
        assert list(two) == list(alone)


def test_a_text_can_begin_where_another_was_dropped():
    model = tiny("llama")
    cached = CachedModel(model)
    next(stream(model, TOKENIZER, "ab", Sampling(max_new_tokens=30), cached=cached))
    found = stream(model, TOKENIZER, "abc", Sampling(max_new_tokens=5), cached=cached)
    assert "".join(found) == complete(model, TOKENIZER, "abc", Sampling(max_new_tokens=5)).text
    assert found.statistics.reused_tokens > 1


def test_the_chat_template_makes_the_prompt():
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids) == "<s>user: Hi<|end|>assistant:"
    assert ids.count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(InputError, match="no system messages"):
        chat_ids(tokenizer, [{"role": "system", "content": "Hi"}])
    with pytest.raises(InputError, match="no chat template"):
        chat_ids(TOKENIZER, [{"role": "user", "content": "Hi"}])
