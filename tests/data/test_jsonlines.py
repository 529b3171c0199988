import gzip
from pathlib import Path

import pytest

from bitnet.data.jsonlines import read_json_lines
from bitnet.errors import InputError

GOOD = b'{"text": "good"}\n'


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["s.json.gz", "s.jsonl"])
def test_documents_come_in_order_without_blank_ones(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, b'{"text": "one\\ntwo"}\n{"text": "  "}\n{"text": "\xc3\xa9"}')
    assert list(read_json_lines(path, {})) == ["one\ntwo", "é"]


BAD = [
    b'{"text": null}',
    b'{"url": "x"}',
    b'{"text": 3}',
    b"[1]",
    b'{"text": "cut',
    b"",
    b'{"text": "\xff"}',
    b"[" * 9999,
]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_an_error_with_shard_and_line(tmp_path: Path, bad: bytes) -> None:
    path = written(tmp_path / "s.json.gz", GOOD + bad + b"\n" + GOOD)
    with pytest.raises(InputError, match=r"^s\.json\.gz:2: expected .*on_bad_line=skip"):
        list(read_json_lines(path, {}))


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_skipped_and_counted_where_asked_for(tmp_path: Path, bad: bytes) -> None:
    path, skipped = written(tmp_path / "s.json.gz", GOOD + bad + b"\n" + GOOD), dict[str, int]()
    for _ in range(2):  # read again, as the next epoch does: the line counts once
        assert list(read_json_lines(path, skipped, on_bad_line="skip")) == ["good", "good"]
    assert skipped == {str(path): 1}


def test_a_truncated_gzip_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "s.json.gz", b"".join(b'{"text": "%d"}\n' % n for n in range(5000)))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"s\.json\.gz is truncated or damaged"):
        list(read_json_lines(path, {}, on_bad_line="skip"))


def test_a_file_that_is_no_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.json.gz"
    path.write_bytes(GOOD)
    with pytest.raises(InputError, match=r"s\.json\.gz is truncated or damaged"):
        list(read_json_lines(path, {}))


def test_flipped_bytes_inside_a_gzip_file_are_found(tmp_path: Path) -> None:
    path = written(tmp_path / "s.json.gz", b"".join(b'{"text": "%d"}\n' % (n * n) for n in range(5000)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        list(read_json_lines(path, {}, on_bad_line="skip"))


@pytest.mark.parametrize("content", [b"", gzip.compress(b"", mtime=0)])
def test_an_empty_shard_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.json.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds no documents"):
        list(read_json_lines(path, {}))
