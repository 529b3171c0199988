"""The command line: ``python train.py model=bitnet158 data=c4``. See ``python train.py --help``."""

import os
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bitnet.errors import InputError

CONFIG = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONFIG), config_name="config")
def main(cfg: DictConfig) -> None:
    from bitnet.experiment.run import run  # here, so that --help and a misspelt key do not wait for torch

    try:
        run(cfg)
    except (HydraException, InputError, OSError) as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # Hydra notes the failure and goes on with the next job
        refuse(error)


def refuse(error: Exception) -> NoReturn:
    """End with one line that says what to do; raise ``error`` again where it is no refusal but a fault."""
    from bitnet.experiment.explain import explained

    if isinstance(error, OSError) and error.filename is not None:  # a full disk, a folder without permission
        sys.exit(f"error: {error.filename}: {error.strerror}")
    message = str(error) if isinstance(error, InputError) else explained(error, CONFIG)
    if message is None:
        raise error
    sys.exit(f"error: {message}")


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come here as they are, to be told in one line
    try:
        main()
    except (HydraException, OmegaConfBaseException, InputError, ValueError, RuntimeError) as error:
        refuse(error)
    finally:
        from bitnet.experiment.sweep import finish

        finish()  # the table of a sweep that stopped on the way
