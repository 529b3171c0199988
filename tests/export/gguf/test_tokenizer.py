"""Tokenizers go into a file and come back as they were; those that llama.cpp would read otherwise are refused."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitnet.errors import InputError
from bitnet.export.gguf.container import Blob, Container, Value, write_container
from bitnet.export.gguf.tokenizer import (
    PRE_TOKENIZERS,
    PROBE,
    read_tokenizer,
    same_templates,
    same_tokens,
    tokenizer_pairs,
    tokenizer_problems,
)

TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TEXTS = [
    PROBE,
    "",
    " ",
    "a",
    "  leading and trailing  ",
    "x\n\n\ny\t\tz \n",
    "<s>begin</s> and <|user|>hi",
    "don't we're I'LL",
    "1 12 123 1234 12345",
]


def rule(name: str):
    if name == "gpt-2":
        return None
    parts = []
    for part in PRE_TOKENIZERS[name]:
        if part["type"] == "Split":
            parts.append(pre_tokenizers.Split(Regex(part["pattern"]["Regex"]), "isolated"))
        elif part["type"] == "Digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=part["use_regex"]))
    return pre_tokenizers.Sequence(parts)


def stored(path, pairs) -> Container:
    write_container(path, {"general.architecture": Value("str", "llama"), **pairs}, list[Blob]())
    return Container(path)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True), (False, True)])
def test_a_tokenizer_comes_back_with_the_same_tokens(bpe, tmp_path, name, bos, eos):
    tokenizer = bpe(rule(name), bos=bos, eos=eos, ignore_merges=name == "llama-bpe", template=TEMPLATE)
    assert list(tokenizer_problems(tokenizer, 320)) == []
    file = stored(tmp_path / "x", tokenizer_pairs(tokenizer, 320))
    assert file.text("tokenizer.ggml.pre") == name
    read = read_tokenizer(file)
    assert read is not None
    assert same_tokens(tokenizer, read)
    for text in TEXTS:
        assert read.encode(text) == tokenizer.encode(text), text
        assert read.decode(read.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        assert read.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert (read.bos_token_id, read.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    assert read.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("normalizer", [{"type": "NFC"}, None])
def test_the_normalizer_that_qwen_has_comes_back(bpe, edited, tmp_path, normalizer):
    tokenizer = edited(bpe(rule("qwen2")), lambda stored: stored.update(normalizer=normalizer))
    assert list(tokenizer_problems(tokenizer, 320)) == []
    read = read_tokenizer(stored(tmp_path / "x", tokenizer_pairs(tokenizer, 320)))
    assert read is not None
    for text in ("cafe\u0301", "caf\u00e9"):
        assert read.encode(text) == tokenizer.encode(text)


def test_entries_without_a_token_are_unused_and_special_ones_are_marked(bpe, tmp_path):
    tokenizer = bpe()
    tokenizer.add_tokens([AddedToken("plain words", normalized=False)])
    pairs = tokenizer_pairs(tokenizer, 320)
    tokens, kinds = pairs["tokenizer.ggml.tokens"].value, pairs["tokenizer.ggml.token_type"].value
    assert len(tokens) == len(kinds) == len(set(tokens)) == 320
    assert kinds[:3] == [3, 3, 3]
    assert kinds[tokens.index("plain words")] == 4
    assert kinds[-1] == 5
    assert tokens[-1] == "[PAD319]"
    read = read_tokenizer(stored(tmp_path / "x", pairs))
    assert read is not None
    assert read.encode("some plain words here") == tokenizer.encode("some plain words here")
    assert len(read.get_vocab()) == len(tokenizer.get_vocab())


def test_without_a_tokenizer_the_file_says_so(tmp_path):
    file = stored(tmp_path / "x", tokenizer_pairs(None, 320))
    assert file.text("tokenizer.ggml.model") == "no_vocab"
    assert read_tokenizer(file) is None


def _word_piece():
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "no name of llama.cpp"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "no name of llama.cpp"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges=False"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizes text"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "normalizes text"),
        (lambda t: t["model"].update(dropout=0.5), "dropout"),
        (lambda t: t["added_tokens"][2].update(lstrip=True), "takes neighbouring spaces"),
        (lambda t: t.update(decoder=None), "not byte-level BPE"),
    ],
)
def test_tokenizers_that_llama_cpp_reads_otherwise_are_refused(bpe, edited, change, match):
    assert match in "; ".join(tokenizer_problems(edited(bpe(), change), 320))


def test_other_tokenizers_and_those_of_other_models_are_refused(bpe):
    assert "not byte-level BPE" in "; ".join(tokenizer_problems(_word_piece(), 320))
    assert "300 embeddings" in "; ".join(tokenizer_problems(bpe(), 300))
    tokenizer = bpe()
    tokenizer.eos_token = None
    assert "no end of text" in "; ".join(tokenizer_problems(tokenizer, 320))


def test_the_end_stands_for_a_begin_that_is_not_there(bpe):
    tokenizer = bpe(bos=False)
    tokenizer.bos_token = None
    assert list(tokenizer_problems(tokenizer, 320)) == []
    assert tokenizer_pairs(tokenizer, 320)["tokenizer.ggml.bos_token_id"].value == 1


def test_a_tokenizer_of_another_kind_is_left_out_with_a_warning(bpe, tmp_path):
    pairs = tokenizer_pairs(bpe(), 320)
    for key, value in (("tokenizer.ggml.model", "llama"), ("tokenizer.ggml.pre", "deepseek-llm")):
        file = stored(tmp_path / "x", {**pairs, key: Value("str", value)})
        with pytest.warns(UserWarning, match="only the model is"):
            assert read_tokenizer(file) is None


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("tokenizer.ggml.tokens", Value("str[]", ["a"] * 320), "different"),
        ("tokenizer.ggml.tokens", Value("i32[]", [1] * 320), "lists of strings"),
        ("tokenizer.ggml.token_type", Value("i32[]", [1] * 319), "319 kinds"),
        ("tokenizer.ggml.merges", Value("str[]", ["a b c"]), "no merge of two"),
        ("tokenizer.ggml.merges", Value("str[]", ["nowhere tobefound"]), "make no tokenizer"),
        ("tokenizer.ggml.bos_token_id", Value("u32", 320), "none of the 320 tokens"),
        ("tokenizer.chat_template", Value("u32", 3), "a string"),
        ("tokenizer.chat_templates", Value("u32", 3), "a list of names"),
        ("tokenizer.chat_templates", Value("str[]", ["lost"]), "chat_template.lost, which is missing"),
    ],
)
def test_a_damaged_tokenizer_is_refused(bpe, tmp_path, key, value, match):
    file = stored(tmp_path / "x", {**tokenizer_pairs(bpe(), 320), key: value})
    with pytest.raises(InputError, match=match):
        read_tokenizer(file)


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({"default": "A", "tool_use": "B"}, {"default": "A", "tool_use": "B"}),
        ({"tool_use": "B"}, {"tool_use": "B"}),
        ({"default": "A"}, "A"),
        ("A", "A"),
        (None, None),
    ],
)
def test_chat_templates_come_back_under_their_names(bpe, tmp_path, templates, expected):
    tokenizer = bpe()
    tokenizer.chat_template = templates
    pairs = tokenizer_pairs(tokenizer, 320)
    read = read_tokenizer(stored(tmp_path / "x", pairs))
    assert read.chat_template == expected
    assert same_templates(tokenizer, read)
    named = templates if isinstance(templates, dict) else {"default": templates}
    assert ("tokenizer.chat_template" in pairs) == bool(named.get("default"))
    read.chat_template = {"default": "A", "tool_use": "C"}
    assert not same_templates(tokenizer, read)


def test_ends_beside_the_tokenizers_are_the_end_of_turn_and_of_message(bpe):
    pairs = tokenizer_pairs(bpe(), 320, [7, 1, 9, 11])
    assert pairs["tokenizer.ggml.eos_token_id"].value == 1
    assert pairs["tokenizer.ggml.eot_token_id"].value == 7
    assert pairs["tokenizer.ggml.eom_token_id"].value == 9
    assert not {"tokenizer.ggml.eot_token_id"} & tokenizer_pairs(bpe(), 320, [1]).keys()
