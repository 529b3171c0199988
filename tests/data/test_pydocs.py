from pathlib import Path

import pytest

from bitnet.data import pydocs
from bitnet.data.pydocs import PyDocs
from bitnet.data.sources import SPLITS, documents_of

LIBRARY = {
    "alpha.py": '"""The alpha module."""\nclass A:\n    """A thing."""\n    def run(self, x: int = 3) -> None:\n'
    '        """Runs it.\n\n        Twice.\n        """\ndef helper(*args):\n    """Runs it.\n\n    Twice.\n    """\n',
    "pack/__init__.py": '"""The pack package."""\n',
    "test/test_alpha.py": '"""A test that is left out."""\n',
    "broken.py": "this is a template, not Python\n",
}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in LIBRARY.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(pydocs, "_library", lambda: tmp_path)
    return tmp_path


@pytest.mark.usefixtures("library")
def test_documents_are_topics_modules_classes_and_functions() -> None:
    found = [document for split in SPLITS for document in documents_of(PyDocs(), split)]
    assert "alpha\n\nThe alpha module." in found
    assert "class A:\n    A thing.\n\n    run(self, x: int=3):\n        Runs it.\n\n        Twice." in found
    assert "pack\n\nThe pack package." in found
    assert any("lambda" in document for document in found), "no topic of the language reference"


@pytest.mark.usefixtures("library")
def test_a_docstring_that_repeats_another_is_left_out() -> None:
    found = [document for split in SPLITS for document in documents_of(PyDocs(), split)]
    assert sum("Runs it." in document for document in found) == 1
    assert len(set(found)) == len(found)


@pytest.mark.usefixtures("library")
def test_tests_of_the_library_are_left_out() -> None:
    found = [document for split in SPLITS for document in documents_of(PyDocs(), split)]
    assert not any("left out" in document for document in found)


def test_fingerprint_follows_the_files(library: Path) -> None:
    before = PyDocs().fingerprint()
    assert PyDocs().fingerprint() == before
    (library / "alpha.py").write_text("x = 1\n")
    assert PyDocs().fingerprint() != before


@pytest.mark.slow
def test_the_running_python_carries_two_megabytes() -> None:
    size = sum(len(document.encode()) for document in documents_of(PyDocs(), "train"))
    assert size > 1_500_000
