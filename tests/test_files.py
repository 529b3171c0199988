"""A file or folder is whole or absent, whatever happens while it is written."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from bitnet.errors import InputError
from bitnet.files import atomic_directory, atomic_file, new_file


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


def test_a_new_file_never_replaces_one_that_appeared_meanwhile(tmp_path):
    target = tmp_path / "file"
    with pytest.raises(InputError, match="exists already"), new_file(target) as partial:  # noqa: PT012
        partial.write_text("mine")
        target.write_text("theirs")
    assert target.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_new_file_is_written_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    with new_file(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"
    with pytest.raises(InputError, match="exists already"), new_file(tmp_path / "other") as partial:  # noqa: PT012
        partial.write_text("mine")
        (tmp_path / "other").write_text("theirs")
    assert (tmp_path / "other").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


@pytest.mark.parametrize("make", [new_file, atomic_directory])
def test_a_link_that_leads_nowhere_is_not_written_over(tmp_path, make):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists already"), make(tmp_path / "link"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("held", [True, False])
def test_a_folder_that_appeared_meanwhile_is_refused_full_or_empty(tmp_path, held):
    target = tmp_path / "out"
    with pytest.raises(InputError, match="exists already"), atomic_directory(target) as partial:  # noqa: PT012
        (partial / "a").write_text("mine")
        target.mkdir()
        if held:
            (target / "a").write_text("theirs")
    assert [path.name for path in target.iterdir()] == ["a"] * held
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_at_the_last_moment_is_an_input_error(tmp_path, monkeypatch):
    target, rename = tmp_path / "out", os.rename

    def late(source, to):
        target.mkdir()
        (target / "a").write_text("theirs")
        rename(source, to)

    monkeypatch.setattr("os.rename", late)
    with pytest.raises(InputError, match="exists already"), atomic_directory(target) as partial:
        (partial / "a").write_text("mine")
    assert (target / "a").read_text() == "theirs"


@pytest.mark.parametrize("make", [atomic_file, new_file, atomic_directory])
def test_what_a_killed_writer_left_goes_when_the_target_is_written_again(tmp_path, make):
    code = (
        "import os, signal, sys, bitnet.files as files\n"
        "with getattr(files, sys.argv[1])(sys.argv[2]) as path:\n"
        "    (path / 'a' if path.is_dir() else path).write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, make.__name__, str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    with make(tmp_path / "other") as path:  # another target: not its business
        path.touch()
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    with make(tmp_path / "out") as path:
        path.touch()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other", "out"]


def test_what_a_living_writer_is_writing_stays(tmp_path):
    with atomic_file(tmp_path / "file") as first:
        first.write_text("first")
        with atomic_file(tmp_path / "file") as second:
            second.write_text("second")
        assert first.read_text() == "first"
    assert (tmp_path / "file").read_text() == "first"


@pytest.mark.parametrize("make", [atomic_file, new_file, atomic_directory])
def test_a_failed_write_takes_the_folders_with_it_that_it_made(tmp_path, make):
    (tmp_path / "old").mkdir()
    with pytest.raises(RuntimeError), make(tmp_path / "old" / "new" / "newer" / "out"):
        raise RuntimeError
    assert list((tmp_path / "old").iterdir()) == []
    with pytest.raises(RuntimeError), make(tmp_path / "old" / "new" / "newer" / "out"):  # noqa: PT012
        (tmp_path / "old" / "new" / "theirs").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "old" / "new").iterdir()] == ["theirs"]


@pytest.mark.parametrize("make", [new_file, atomic_directory])
def test_a_place_below_a_file_is_an_input_error(tmp_path, make):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(InputError, match="is no folder"), make(target):
            pass
