"""The text that the jobs train on, and the folder's own modules."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for cluster


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sixty short documents, all different."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"Document {n} says that {n} times {n} is {n * n}." for n in range(60)))
    return path
