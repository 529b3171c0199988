"""Configurations of runs that take seconds: a tiny model on a few sentences."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parent))  # for made_records
CONFIG = Path(__file__).parents[2] / "conf"

TINY = [
    "size.hidden_size=32",
    "size.intermediate_size=48",
    "size.num_hidden_layers=2",
    "data=text",
    "data.block_size=32",
    "data.batch_size=2",
    "data.validation_blocks=4",
    "data.tokenizer.vocab_size=300",
    "trainer.max_steps=6",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1",
    "callbacks.samples.max_new_tokens=4",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sixty short documents, all different."""
    path = tmp_path / "corpus.txt"
    path.write_text(
        "\n\n".join(f"Document {n} says that {n} times {n} is {n * n}." for n in range(60)), encoding="utf-8"
    )
    return path


@pytest.fixture
def tiny_settings() -> list[str]:
    return TINY


@pytest.fixture
def tiny(tmp_path: Path, corpus: Path) -> Callable[..., DictConfig]:
    """Compose a tiny run in ``tmp_path/run``; arguments are overrides as on the command line."""

    def configure(*overrides: str) -> DictConfig:
        given = {each.split("=")[0] for each in overrides}
        shaped = not {"size=none", "model=hf"} & set(overrides)  # without a size there are no values of one to set
        own = [each for each in TINY if shaped or not each.startswith("size.")]
        standard = [*own, f"data.path={corpus}", f"cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}"]
        with initialize_config_dir(str(CONFIG), version_base="1.3"):
            return compose("config", [*(each for each in standard if each.split("=")[0] not in given), *overrides])

    return configure
