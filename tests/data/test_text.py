import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from bitnet.data.sources import SPLITS, documents_of
from bitnet.data.text import Text
from bitnet.errors import InputError


def all_documents(source: Text) -> set[str]:
    return {document for split in SPLITS for document in documents_of(source, split)}


def test_blank_lines_separate_the_documents_of_a_txt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \t\n\n  three\nfour\n")
    assert all_documents(Text(tmp_path / "a.txt")) == {"one\ntwo", "  three\nfour"}


def test_a_file_can_be_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert all_documents(Text(tmp_path / "a.txt", documents="file")) == {"one\n\ntwo"}


def test_a_folder_is_searched_for_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "deep" / "b.jsonl").write_text(json.dumps({"body": "line"}) + "\n")
    parquet.write_table(pyarrow.table({"body": ["row"]}), tmp_path / "c.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert all_documents(Text(tmp_path, field="body")) == {"plain", "line", "row"}


def test_a_glob_takes_what_matches(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    assert all_documents(Text(str(tmp_path / "a*.txt"))) == {"a1.txt", "a2.txt"}


@pytest.mark.parametrize(
    ("path", "message"),
    [(None, "set data.path"), ("missing", "nothing there matches"), ("*.txt", "nothing there matches")],
)
def test_no_files_is_an_error(tmp_path: Path, path: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Text(path if path is None else str(tmp_path / path))


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(InputError, match=r"a\.pdf cannot be read as text: expected one of \.txt"):
        Text(tmp_path / "a.pdf")


def test_invalid_utf8_is_named_with_file_and_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\nok\n".encode() + b"ab\xffcd\n")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8: byte 0xff at offset 8: .*invalid_utf8=replace"):
        all_documents(Text(tmp_path / "a.txt"))


def test_invalid_utf8_is_replaced_and_counted_where_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xffcd\nfine\n\xfe\n")
    source = Text(tmp_path / "a.txt", invalid_utf8="replace")
    assert all_documents(source) == {"ab\ufffdcd\nfine\n\ufffd"}
    assert [Path(path).name for path in source.skipped] == ["a.txt"]
    assert list(source.skipped.values()) == [2]


@pytest.mark.parametrize(
    ("table", "message"),
    [({"body": ["x"]}, r"no column 'text' \(it has body\)"), ({"text": ["x", None]}, r"row 1 holds None in 'text'")],
)
def test_a_parquet_file_without_text_is_refused(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        all_documents(Text(tmp_path))


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"a\.parquet is not a readable parquet file"):
        all_documents(Text(tmp_path))


def test_a_policy_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.source\.documents must be one of paragraph, file, got 'page'"):
        Text(tmp_path, documents="page")  # pyright: ignore[reportArgumentType]


def test_fingerprint_follows_files_and_options(text_file: Path) -> None:
    before = Text(text_file).fingerprint()
    assert Text(text_file).fingerprint() == before
    assert Text(text_file, documents="file").fingerprint() != before
    text_file.write_text("other")
    assert Text(text_file).fingerprint() != before
