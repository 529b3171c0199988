import random

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from bitnet.data import tokenize
from bitnet.data.tokenize import DocumentEncoder
from bitnet.errors import InputError


def test_all_tokens_decode_to_the_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> None:
    encoded = DocumentEncoder(tokenizer).encode(documents)
    text = tokenizer.decode(np.concatenate(encoded).tolist())
    assert text == "".join(f"<s>{document}</s>" for document in documents)


def test_a_mark_spelled_out_in_the_text_is_not_the_mark(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = DocumentEncoder(tokenizer).encode(["one </s> two <s>"])[0]
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert (ids == tokenizer.bos_token_id).sum() == 1
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [tokenizer.eos_token_id], (
        "the caller's tokenizer changed"
    )


def test_places_stay_with_their_documents(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "GROUP", 700)
    encoder = DocumentEncoder(tokenizer)
    together = list(encoder.encode_all((document, number) for number, document in enumerate(documents)))
    assert [place for _, _, place in together] == list(range(len(documents)))
    for ids, document, _ in together:
        assert np.array_equal(ids, encoder.encode([document])[0])


def test_a_long_document_in_pieces_has_the_same_ids(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    text = "".join(rng.choice(["a", "ternary", "weights", " ", "  ", "\n", "'s", "9", "é", "."]) for _ in range(3000))
    whole = DocumentEncoder(tokenizer).encode([text])[0]
    for piece in (200, 501, 1777):
        monkeypatch.setattr(tokenize, "PIECE", piece)
        assert np.array_equal(DocumentEncoder(tokenizer).encode([text])[0], whole)


def test_a_long_document_without_spaces_loses_nothing(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "PIECE", 100)
    text = "x🙂é" * 500
    ids = DocumentEncoder(tokenizer).encode([text])[0]
    assert tokenizer.decode(ids[1:-1].tolist()) == text


def test_where_both_marks_are_one_it_stands_at_the_end_only(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.bos_token = tokenizer.eos_token
    ids = DocumentEncoder(tokenizer).encode(["abc"])[0]
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[0] != tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_mark_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="must have an end-of-text token"):
        DocumentEncoder(tokenizer)
