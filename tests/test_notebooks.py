"""The notebooks run from top to bottom, are kept without outputs, and need nothing but the package."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MINUTES = 15  # for one cell at most: no notebook takes one of CPU, but a machine may be busy


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One folder of tokens and tokenizers for all notebooks, whichever process runs them."""
    return tmp_path_factory.getbasetemp().parent / "notebooks-cache"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_without_network(path, tmp_path, cache, monkeypatch):
    settings = {"BITNET_CACHE": cache, "IPYTHONDIR": tmp_path, "HF_HUB_OFFLINE": 1, "TMPDIR": tmp_path}
    settings["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's wish for ipywidgets
    for name, value in settings.items():
        monkeypatch.setitem(os.environ, name, str(value))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=60 * MINUTES, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    said = "".join(output.get("text", "") for output in outputs if output.get("name") == "stderr")
    assert "Warning" not in said, said


def test_there_are_four_notebooks():
    assert [path.stem[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert not cell.metadata, cell.metadata
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata["language_info"]) == {"name"}  # not the Python that it was last opened with


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_between_notebooks_and_pages_lead_somewhere(path):
    notebook = nbformat.read(path, as_version=4)
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", "\n".join(cell.source for cell in notebook.cells)):
        assert (path.parent / target).exists(), target
