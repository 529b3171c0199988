"""Text that comes token by token is the text of all tokens, and no piece holds half a character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_models import TEXT, byte_fallback, byte_level

from bitnet.generation import Detokenizer, StopFilter

BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer, ids, context=()):
    text = Detokenizer(tokenizer, context)
    return [*(text.push(each) for each in ids), text.end()]


def test_characters_of_several_tokens_come_whole():
    ids = BYTE_LEVEL.encode("a𝄞語", add_special_tokens=False)
    assert len(ids) == 8
    assert pieces(BYTE_LEVEL, ids) == ["a", "", "", "", "𝄞", "", "", "語", ""]


@given(st.text(max_size=40))
def test_any_text_comes_back_from_byte_level_tokens(text):
    found = pieces(BYTE_LEVEL, BYTE_LEVEL.encode(text, add_special_tokens=False))
    assert "".join(found) == text
    assert "�" in text or not any("�" in each for each in found)


@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=60), st.lists(st.integers(0, 299), max_size=5))
def test_any_tokens_give_the_text_of_all_of_them(ids, context):
    """Bytes that are no character and special tokens among them; the context's own text is not given again."""
    before = decoded(BYTE_LEVEL, context)
    whole = decoded(BYTE_LEVEL, [*context, *ids])
    if before.endswith("�"):  # the new tokens may complete a character that the context left open
        return
    assert before + "".join(pieces(BYTE_LEVEL, ids, context)) == whole


@given(st.text("the cat猫é s🙂", max_size=40), st.booleans())
def test_byte_fallback_keeps_spaces_and_characters(text, start):
    ids = BYTE_FALLBACK.encode("▁" + text.replace(" ", "▁"), add_special_tokens=False)
    ids = [BYTE_FALLBACK.bos_token_id, *ids] if start else ids
    assert "".join(pieces(BYTE_FALLBACK, ids)) == decoded(BYTE_FALLBACK, ids) == text


def test_the_space_between_prompt_and_continuation_is_kept():
    the, cat = BYTE_FALLBACK.convert_tokens_to_ids(["▁the", "▁cat"])
    assert pieces(BYTE_FALLBACK, [cat], [the]) == [" cat", ""]
    assert pieces(BYTE_FALLBACK, [cat], [1]) == ["cat", ""]
    special = BYTE_LEVEL.convert_tokens_to_ids("<|end|>")
    a, space = BYTE_LEVEL.encode("a b", add_special_tokens=False)[:2]
    assert pieces(BYTE_LEVEL, [a, special, space])[:3] == ["a", "", " "]


def test_bytes_that_never_become_a_character_are_not_held_forever():
    byte = BYTE_LEVEL.convert_tokens_to_ids("ÿ")  # 0xFF
    assert BYTE_LEVEL.decode([byte]) == "�"
    found = pieces(BYTE_LEVEL, [byte] * 200)
    assert "".join(found) == "�" * 200
    assert found[3:-1] == ["�"] * 197


def test_a_token_costs_the_same_wherever_it_stands():
    class Counting:
        tokens = 0

        def decode(self, ids, **options):
            self.tokens += len(ids)
            return BYTE_LEVEL.decode(ids, **options)

    ids = BYTE_LEVEL.encode(TEXT * 3, add_special_tokens=False)
    counting = Counting()
    text = Detokenizer(counting)
    for each in ids:
        text.push(each)
    assert counting.tokens < 8 * len(ids)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one tw", ("two",), "one tw"),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("xabcd", ("abcd", "c"), "xab"),
        ("xabcd", ("bc", "abc", "c"), "x"),
        ("aab", ("ab", "a"), ""),
        ("猫🙂猫", ("🙂",), "猫"),
        ("stop", ("stop",), ""),
        ("anything", (), "anything"),
    ],
)
def test_text_ends_before_the_first_stop_text_however_it_is_cut(text, stops, expected, size):
    filter = StopFilter(stops)
    found = [filter.push(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join([*found, filter.end()]) == expected
    assert filter.stopped == (expected != text)


def test_no_more_is_held_back_than_may_belong_to_a_stop_text():
    filter = StopFilter(["\n\nUser"])
    assert [filter.push(each) for each in ["Hi", "\n", "you", "\n\n", "Us", "e of"]] == [
        "Hi",
        "",
        "\nyou",
        "",
        "",
        "\n\nUse of",
    ]
