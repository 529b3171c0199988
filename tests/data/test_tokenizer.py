from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitnet.data.tokenizer import TokenizerSpec, check_vocabulary, fingerprint
from bitnet.errors import InputError

NASTY = ["  two  spaces\t\n", "naïve 模型 🙂", "a ' s 's don't", "\x00\x01 bytes", "e\u0301 combining", "<s> and </s>"]


def trained(documents: list[str], folder: Path, size: int = 400) -> PreTrainedTokenizerFast:
    return TokenizerSpec(vocab_size=size).load(lambda: documents, "corpus", folder)


def test_training_twice_gives_the_same_tokenizer(documents: list[str], tmp_path: Path) -> None:
    one, two = trained(documents, tmp_path / "1"), trained(documents, tmp_path / "2")
    assert fingerprint(one) == fingerprint(two)
    assert one(documents[3]).input_ids == two(documents[3]).input_ids
    assert len(one) == 400


def test_it_is_trained_once_and_then_read_from_the_cache(documents: list[str], tmp_path: Path) -> None:
    def never() -> list[str]:
        raise AssertionError("trained a second time")

    first = trained(documents, tmp_path)
    assert fingerprint(TokenizerSpec(vocab_size=400).load(never, "corpus", tmp_path)) == fingerprint(first)


@pytest.mark.parametrize("change", [{"corpus": "other"}, {"size": 410}])
def test_other_text_or_another_size_is_another_cache_entry(
    documents: list[str], tmp_path: Path, change: dict[str, Any]
) -> None:
    trained(documents, tmp_path)
    spec = TokenizerSpec(vocab_size=change.get("size", 400))
    asked: list[bool] = []
    spec.load(lambda: asked.append(True) or documents, change.get("corpus", "corpus"), tmp_path)
    assert asked


def test_saved_and_loaded_by_auto_tokenizer_it_is_the_same(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert fingerprint(loaded) == fingerprint(tokenizer)
    for text in [*documents[:20], *NASTY]:
        ids = tokenizer(text).input_ids
        assert loaded(text).input_ids == ids
        assert ids[0] == tokenizer.bos_token_id
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "</s>")


@pytest.mark.parametrize("text", NASTY)
def test_decoding_gives_the_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_given_directory_is_used_as_it_is(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = TokenizerSpec(path=str(tmp_path / "saved")).load(list, "any corpus", tmp_path)
    assert fingerprint(loaded) == fingerprint(tokenizer)


@pytest.mark.parametrize("path", ["/no/such/folder", "."])
def test_a_path_without_a_tokenizer_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"data\.tokenizer\.path must be a directory with a saved tokenizer"):
        TokenizerSpec(path=path).load(list, "corpus", tmp_path)


def test_a_vocabulary_too_small_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vocab_size must be at least 258 .* got 200"):
        TokenizerSpec(vocab_size=200).load(list, "corpus", tmp_path)


def test_fingerprints_tell_tokenizers_apart(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], tmp_path: Path
) -> None:
    other = trained(documents[:100], tmp_path / "other", size=358)
    assert len(other) == len(tokenizer)
    assert fingerprint(other) != fingerprint(tokenizer)


def test_a_vocabulary_that_exceeds_the_models_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(InputError, match=rf"largest id is {len(tokenizer) - 1} and the model has {len(tokenizer) - 1}"):
        check_vocabulary(tokenizer, len(tokenizer) - 1)
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(InputError, match="vocab_size to at least"):
        check_vocabulary(tokenizer, len(tokenizer) - 1)
