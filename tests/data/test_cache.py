import errno
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from bitnet.data.cache import Tokens, cached_tokens, tokens_in_memory
from bitnet.data.tokenize import DocumentEncoder
from bitnet.errors import InputError


@pytest.fixture
def stem(tmp_path: Path) -> Path:
    return tmp_path / "tokens" / "text.train"


@pytest.fixture
def open_cache(tokenizer: PreTrainedTokenizerFast, documents: list[str], stem: Path) -> Callable[..., Tokens]:
    def opened(source: Callable[[], Iterable[str]] = lambda: documents, vocab_size: int = len(tokenizer)) -> Tokens:
        return cached_tokens(source, DocumentEncoder(tokenizer), vocab_size, stem)

    return opened


def never() -> list[str]:
    raise AssertionError("tokenized a second time")


def test_the_tokens_decode_to_the_documents(
    open_cache: Callable[..., Tokens], tokenizer: PreTrainedTokenizerFast, documents: list[str]
) -> None:
    tokens = open_cache()
    parts = np.split(tokens.ids, tokens.starts[1:])
    assert [tokenizer.decode(part[1:-1].tolist()) for part in parts] == documents
    assert tokens.n_bytes == sum(len(document.encode()) for document in documents)
    assert tokens.ids.dtype == np.uint16


def test_an_intact_cache_is_not_written_again(open_cache: Callable[..., Tokens]) -> None:
    first, second = open_cache(), open_cache(never)
    assert np.array_equal(first.ids, second.ids)
    assert (first.text_hash, first.n_bytes) == (second.text_hash, second.n_bytes)


def test_a_large_vocabulary_takes_four_bytes(open_cache: Callable[..., Tokens]) -> None:
    assert open_cache(vocab_size=65_537).ids.dtype == np.uint32


@pytest.mark.parametrize("suffix", ["ids", "starts", "json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_cache_is_built_again_with_a_line_that_says_so(
    open_cache: Callable[..., Tokens], stem: Path, suffix: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = np.array(open_cache().ids)
    path = stem.with_name(f"{stem.name}.{suffix}")
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2 if suffix != "json" else 0] ^= 0x5A
        path.write_bytes(content)
    assert np.array_equal(open_cache().ids, expected)
    said = capsys.readouterr().err
    assert ("building it again" in said) == ((suffix, damage) != ("json", "missing")), said


def test_an_id_outside_the_vocabulary_is_refused(open_cache: Callable[..., Tokens]) -> None:
    largest = int(open_cache().ids.max())
    with pytest.raises(InputError, match=rf"holds the id {largest} and the vocabulary has {largest} entries"):
        open_cache(vocab_size=largest)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    open_cache: Callable[..., Tokens], stem: Path, documents: list[str]
) -> None:
    def full() -> Iterable[str]:
        yield from documents
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"cannot write the token cache .* \(No space left on device\)"):
        open_cache(full)
    assert not stem.parent.exists()  # the folder was made for the cache, and goes with it


def test_an_error_of_the_source_is_not_taken_for_one_of_the_cache(open_cache: Callable[..., Tokens]) -> None:
    def unreadable() -> Iterable[str]:
        raise PermissionError(errno.EACCES, "Permission denied", "own.txt")

    with pytest.raises(PermissionError, match=r"own\.txt"):
        open_cache(unreadable)


def test_no_documents_make_an_empty_cache(open_cache: Callable[..., Tokens]) -> None:
    tokens = open_cache(list)
    assert (len(tokens.ids), len(tokens.starts), tokens.n_bytes) == (0, 0, 0)


def test_in_memory_the_tokens_are_the_same(
    open_cache: Callable[..., Tokens], tokenizer: PreTrainedTokenizerFast, documents: list[str]
) -> None:
    tokens, cached = tokens_in_memory(documents, DocumentEncoder(tokenizer), None), open_cache()
    assert np.array_equal(tokens.ids, cached.ids)
    assert np.array_equal(tokens.starts, cached.starts)
    assert (tokens.n_bytes, tokens.text_hash) == (cached.n_bytes, cached.text_hash)


def test_in_memory_no_more_documents_are_taken_than_needed(
    tokenizer: PreTrainedTokenizerFast, documents: list[str]
) -> None:
    tokens = tokens_in_memory(documents, DocumentEncoder(tokenizer), 500)
    assert tokens.starts[-1] < 500 <= len(tokens.ids)
    assert tokens.n_bytes == sum(len(document.encode()) for document in documents[: len(tokens.starts)])


@pytest.mark.parametrize("block_size", [7, 64])
def test_blocks_cut_the_text_without_loss(open_cache: Callable[..., Tokens], block_size: int) -> None:
    tokens = open_cache()
    blocks = [tokens.block(index, block_size) for index in range(-(-len(tokens.ids) // block_size))]
    assert np.array_equal(np.concatenate([block.ids for block in blocks]), tokens.ids)
    starts = [index * block_size + int(start) for index, block in enumerate(blocks) for start in block.starts]
    assert starts == tokens.starts.tolist()


def test_the_sidecar_names_what_was_written(open_cache: Callable[..., Tokens], stem: Path) -> None:
    tokens = open_cache()
    sidecar: dict[str, Any] = json.loads(stem.with_name(f"{stem.name}.json").read_text())
    assert sidecar["tokens"] == len(tokens.ids)
    assert sidecar["files"]["ids"]["size"] == 2 * len(tokens.ids)
