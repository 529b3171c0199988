"""The documentation does what it says: commands compose and are dry-run, Python blocks run, links lead somewhere."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from bitnet.data import TokenizerSpec
from bitnet.experiment.run import run
from bitnet.export import export
from bitnet.models import Size, from_scratch
from bitnet.nn import convert
from bitnet.report import RunRecord

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _commands() -> list[str]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    found = re.findall(r"(?:^|`)python train\.py(.*?)(?:  +#.*)?(?:`|$)", text, re.MULTILINE)
    help_page = (ROOT / "conf" / "hydra" / "bitnet.yaml").read_text(encoding="utf-8")
    found += re.findall(r"^ +python train\.py(.*?)(?:  .*)?$", help_page, re.MULTILINE)
    commands = {command.strip() for command in found} - {"--help", ""}
    return sorted(
        each for each in commands if not re.search("resume=|NAME", each)
    )  # tests/experiment resumes real runs


def _jobs(overrides: list[str]) -> list[list[str]]:
    """The first and the last job of a sweep; a single run as it is."""
    rest = [each for each in overrides if each not in ("-m", "[...]", "--cfg", "job")]
    if "-m" not in overrides:
        return [rest]
    choices = [each.partition("=")[::2] for each in rest]
    several = [(key, [values] if values.startswith("[") else values.split(",")) for key, values in choices]
    return [[f"{key}={values[end]}" for key, values in several] for end in (0, -1)]


def _module_commands() -> list[str]:
    """What the documentation calls as ``python -m bitnet.export ...`` and the like."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    found = re.findall(r"(?:^|`)python -m (bitnet\..*?)(?:  +#.*)?(?:`|$)", text, re.MULTILINE)
    return sorted({each.strip() for each in found if " " in each.strip()})


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's folder, with the things in it that the documentation's commands name."""
    (tmp_path / "main").mkdir()
    monkeypatch.chdir(tmp_path / "main")
    tokenizer = TokenizerSpec(vocab_size=258).load(lambda: ["some text"], "corpus", tmp_path / "cache")
    size = Size(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = from_scratch(body="llama", hidden_act="silu", size=size, vocab_size=258)
    for name in ("llama", "DIR", "../shared/reference/llama-pretrained"):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("command", _commands())
def test_every_command_of_the_documentation_composes_and_is_dry_run(command, capsys):
    for overrides in _jobs(shlex.split(command)):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", [*overrides, "dry_run=true"])
        assert run(cfg) == []
        assert "parameters" in capsys.readouterr().out


@pytest.fixture
def finished_run(reader, tmp_path):
    """``runs/NAME``: the folder of a run that ended."""
    size = Size(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = from_scratch(body="llama", hidden_act="silu", size=size, vocab_size=258)
    convert(model)
    Path("runs/NAME").mkdir(parents=True)
    numbers = {"bits_per_weight": 1.6, "nll": 4.0, "perplexity": 54.6, "seconds": 1.0}
    numbers |= dict.fromkeys(("bytes", "train_tokens", "steps", "seed"), 1)
    unknown = dict.fromkeys(("bits_per_byte", "tokens_per_s", "git_sha", "git_dirty"))
    texts = {"method": "bitnet158 frozen", "model": "nano", "command": "python train.py", "started": "2026-01-02"}
    plain = {name: {} for name in ("data", "config", "versions", "machine")}
    RunRecord(**numbers, **unknown, **texts, **plain).write("runs/NAME/run.json")
    tokenizer = TokenizerSpec(vocab_size=258).load(lambda: ["some text"], "corpus", tmp_path / "cache")
    export(model, "packed", "runs/NAME/packed", tokenizer=tokenizer)


@pytest.mark.usefixtures("finished_run")
@pytest.mark.parametrize("command", _module_commands())
def test_every_other_command_of_the_documentation_runs(command, capsys):
    module, *arguments = shlex.split(command)
    if module == "bitnet.generate":
        arguments += ["--max-new-tokens", "2"]
    main = import_module(module).main if module == "bitnet.generate" else import_module(f"{module}.__main__").main
    assert not main(arguments)  # no exit status but 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    assert "<!--" not in page.read_text(encoding="utf-8")  # a place kept for something that never came
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_stays_under_two_hundred_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
