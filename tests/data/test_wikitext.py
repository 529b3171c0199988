from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from bitnet.data.sources import documents_of
from bitnet.data.wikitext import WikiText, articles
from bitnet.errors import InputError

LINES = [
    "",
    " = First = \n",
    "",
    " text one \n",
    " = = Section = = \n",
    " more \n",
    "",
    " = Second article = \n",
    " text \n",
    "",
]
ARTICLES = ["= First = \n\n text one \n = = Section = = \n more", "= Second article = \n text"]


def test_articles_begin_at_titles_and_not_at_sections() -> None:
    assert list(articles(LINES)) == ARTICLES


def test_parquet_files_of_a_folder_give_their_own_splits(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"):
        parquet.write_table(
            pyarrow.table({"text": LINES if "1-of-00002" not in name else [" tail \n"]}), tmp_path / f"{name}.parquet"
        )
    source = WikiText(tmp_path)
    assert list(documents_of(source, "validation")) == list(documents_of(source, "test")) == ARTICLES
    assert list(documents_of(source, "train")) == [ARTICLES[0], ARTICLES[1] + " \n\n tail"], (
        "an article ran over the file's end"
    )


def test_raw_files_of_a_folder_are_read_as_well(tmp_path: Path) -> None:
    for word in ("train", "valid", "test"):
        (tmp_path / f"wiki.{word}.raw").write_text(f" = {word} = \n body \n")
    assert list(documents_of(WikiText(tmp_path), "validation")) == ["= valid = \n body"]


def test_a_missing_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.raw").write_text(" = A = \n")
    with pytest.raises(InputError, match=r"no file of the validation split in .*wiki\.valid\.raw"):
        WikiText(tmp_path).fingerprint()


def test_the_hub_is_refused_at_once_when_offline() -> None:
    with pytest.raises(InputError, match=r"Salesforce/wikitext is on the Hugging Face hub and HF_HUB_OFFLINE is set"):
        WikiText().shards("train")
