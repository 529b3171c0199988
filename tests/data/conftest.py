"""Small corpora that the data tests share; none is downloaded."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bitnet.data import C4, Text, TokenizerSpec, tokenize
from bitnet.data.tokenizer import SMALLEST_VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = "naïve ternary weights of a 模型 cannot say much, but \t they \n\n say it 🙂 in </s> bits & <s> codes 1.58"
WORDS = TEXT.split(" ")


def _document(number: int) -> str:
    """A distinct document, different in length from its neighbours, with marks, tabs and several scripts in it."""
    rng = random.Random(number)
    return f"document {number}: " + " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 60)))


def _write_shard(path: Path, documents: list[str]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document, "timestamp": "2019-04-25T12:57:54Z", "url": "http://x"}) + "\n")
    return path


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "GROUP", 5000)  # a full group is fifty epochs of these corpora


@pytest.fixture
def make_document() -> Callable[[int], str]:
    return _document


@pytest.fixture
def write_shard() -> Callable[[Path, list[str]], Path]:
    return _write_shard


@pytest.fixture
def documents() -> list[str]:
    return [_document(number) for number in range(200)]


@pytest.fixture
def c4_folder(tmp_path: Path) -> Path:
    """Three training shards of 50, 30 and 41 documents and one validation shard of 60."""
    folder = tmp_path / "c4"
    folder.mkdir()
    begin = 0
    for index, count in enumerate((50, 30, 41)):
        shard = [_document(number) for number in range(begin, begin + count)]
        _write_shard(folder / f"c4-train.{index:05d}-of-00003.json.gz", shard)
        begin += count
    _write_shard(folder / "c4-validation.00000-of-00001.json.gz", [_document(1000 + number) for number in range(60)])
    return folder


@pytest.fixture
def c4(c4_folder: Path) -> C4:
    return C4(c4_folder)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    text = "\n\n".join(_document(number).replace("\n\n", " ") for number in range(300))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def text(text_file: Path) -> Text:
    return Text(text_file)


@pytest.fixture
def spec() -> TokenizerSpec:
    return TokenizerSpec(vocab_size=SMALLEST_VOCABULARY + 100)


@pytest.fixture
def tokenizer(spec: TokenizerSpec, documents: list[str], tmp_path: Path) -> "PreTrainedTokenizerFast":
    return spec.load(lambda: documents, "documents", tmp_path / "tokenizer-cache")
