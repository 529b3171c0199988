"""The command line: ``python train.py model=bitnet158 data=c4``. See ``python train.py --help``."""

import os
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bitnet.errors import InputError


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    from bitnet.experiment import run  # here, so that --help and a misspelt key do not wait for torch

    run(cfg)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come here, whole, to be told in one line
    try:
        main()
    except (InputError, HydraException, OmegaConfBaseException) as error:
        from bitnet.cli import one_line

        sys.exit(f"error: {one_line(error)}")
