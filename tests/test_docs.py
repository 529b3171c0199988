"""The documentation does what it says: commands compose and are dry-run, Python blocks run, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from bitnet.experiment.run import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _commands() -> list[str]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    found = re.findall(r"(?:^|`)python train\.py(.*?)(?:  +#.*)?(?:`|$)", text, re.MULTILINE)
    help_page = (ROOT / "conf" / "hydra" / "bitnet.yaml").read_text(encoding="utf-8")
    found += re.findall(r"^ +python train\.py(.*?)(?:  .*)?$", help_page, re.MULTILINE)
    return sorted({command.strip() for command in found} - {"--help", ""})


def _variants(overrides: list[str]) -> list[list[str]]:
    """The first and the last job of a sweep; a single run as it is."""
    if "-m" not in overrides:
        return [overrides]
    rest = [each for each in overrides if each != "-m"]
    return [
        [re.sub(r"=(.*),.*$" if end else r"=([^,]*),.*$", pick, each) for each in rest] for end, pick in ((0, r"=\1"),)
    ]


@pytest.mark.parametrize("command", _commands())
def test_every_command_of_the_documentation_composes_and_is_dry_run(command, monkeypatch, capsys):
    if "resume=" in command or "NAME" in command:
        pytest.skip("names a run of the reader's: resuming is tested in tests/experiment/test_run.py")
    for overrides in _variants(shlex.split(command)):
        overrides = [each for each in overrides if each not in ("[...]", "--cfg", "job")]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", [*overrides, "dry_run=true"])
        if cfg.model.path is not None:
            monkeypatch.setattr("bitnet.models.build.from_directory", _any_model)
        assert run(cfg) == []
        assert "parameters" in capsys.readouterr().out


def _any_model(path):
    from bitnet.models import Size, from_scratch

    size = Size(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    return from_scratch(body="llama", hidden_act="silu", size=size, vocab_size=32000)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_stays_under_two_hundred_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
