"""A file or folder is whole or absent, whatever happens while it is written."""

import errno

import pytest

from bitnet.errors import InputError
from bitnet.files import atomic_directory, atomic_file


def test_a_file_that_was_written_whole_replaces_the_one_before(tmp_path):
    target = tmp_path / "new" / "file"
    for text in ("first", "second"):
        with atomic_file(target) as partial:
            partial.write_text(text)
    assert target.read_text() == "second"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_was_not_finished_leaves_the_one_before(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("first")
    with pytest.raises(type(error)), atomic_file(target) as partial:  # noqa: PT012
        partial.write_text("sec")
        raise error
    assert target.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_a_folder_that_was_not_finished_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as partial:  # noqa: PT012
        (partial / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_never_written_into(tmp_path):
    with pytest.raises(InputError, match="exists already"), atomic_directory(tmp_path):
        pass
