from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from bitnet.evaluation import BlocksProtocol, TextProtocol

CONF = Path(__file__).parents[2] / "conf"


def composed(group: str, choice: str, *overrides: str):
    with initialize_config_dir(config_dir=str(CONF / group), version_base="1.3"):
        return compose(choice, list(overrides))


@pytest.mark.parametrize(("choice", "kind"), [("blocks", BlocksProtocol), ("text", TextProtocol)])
def test_every_file_of_the_group_gives_a_protocol_with_its_defaults(choice, kind):
    assert sorted(path.stem for path in (CONF / "evaluation").glob("*.yaml")) == ["blocks", "text"]
    assert instantiate(composed("evaluation", choice)) == kind()


def test_tasks_and_sizes_come_from_the_command_line():
    protocol = instantiate(composed("evaluation", "text", "tasks=[arc_easy,piqa]", "window=64", "bootstrap=null"))
    assert protocol == TextProtocol(tasks=("arc_easy", "piqa"), window=64, bootstrap=None)


def test_calibration_names_the_arguments_of_the_data_s_windows():
    import inspect

    from bitnet.data.datamodule import TextDataModule

    keys = set(OmegaConf.to_container(composed("calibration", "default", "seed=0")))
    assert set(inspect.signature(TextDataModule.calibration_windows).parameters) - {"self"} <= keys
