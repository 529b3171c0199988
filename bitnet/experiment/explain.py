"""Hydra's refusals in one line, with what was probably meant."""

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

EXTRAS = {"joblib": "parallel", "submitit_local": "cluster", "submitit_slurm": "cluster"}  # launchers of other packages


def explained(error: Exception, config_directory: Path) -> str | None:
    """The message of ``error`` as one line, with the likeliest meaning of a misspelt key or choice.

    None for an error that is not Hydra's refusal of a command line or a configuration.
    """
    text = str(error)
    if "Config group override must be a string" in text:
        return "a group is switched off with GROUP=none (export=none), a value with GROUP.KEY=null"
    if type(error).__module__.startswith("submitit.") or "Could not detect" in text:
        return _of_a_cluster(text)
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    if choice := re.search(r"Could not find '([\w./-]+)'\n\nAvailable options in '([\w/]+)':\n((?:\t.*\n?)+)", text):
        group, name = choice[2], choice[1].removeprefix(f"{choice[2]}/")
        if name in EXTRAS:
            return f"{group}={name} needs another package: pip install 'bitnet-qat[{EXTRAS[name]}]'"
        return f"{group}={name} is no choice{hint(name, [line.strip() for line in choice[3].splitlines()])}"
    if key := re.search(r"Could not override '([\w./@-]+)'", text):
        return f"there is no key {key[1]!r}{hint(key[1], _near(key[1], _keys(config_directory)))}"
    return " ".join(text.split("\n\n")[0].split())


def _of_a_cluster(text: str) -> str:
    """What Slurm or submitit said: no job was taken, or one was lost."""
    if "Could not detect" in text:
        return (
            "hydra/launcher=submitit_slurm needs Slurm's srun and sbatch, and they are not here: run it on a login node"
        )
    said = [line.removeprefix("sbatch: error: ") for line in text.splitlines() if line.strip()]
    if "sbatch: error" in text:
        return f"Slurm took no job: {said[0]} (hydra.launcher.partition, account and limits; sinfo lists partitions)"
    return f"a job was lost: {said[0] if said else 'submitit says nothing'}: the same command goes on"


def hint(word: str, known: Iterable[str], prefix: str = "") -> str:
    """``: did you mean ...?``, or the choices there are."""
    known = list(known)
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.6):
        return f": did you mean {prefix}{close[0]}?"
    return f": there are {', '.join(known[:12])}; see train.py --help"


def _near(word: str, keys: list[str]) -> list[str]:
    """The keys beside ``word`` in its node, where that node exists; else all."""
    parent = word.rpartition(".")[0]
    return [key for key in keys if key.rpartition(".")[0] == parent] or keys


def _keys(config_directory: Path) -> list[str]:
    """Every dotted key of the default configuration."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory.absolute()), version_base="1.3"):
            return list(_dotted(compose("config"), ""))
    except (HydraException, OmegaConfBaseException):
        return []  # the configuration itself is broken: the message of the first error says how


def _dotted(cfg: DictConfig, prefix: str) -> Iterator[str]:
    for key in map(str, cfg):
        if not key.startswith("_"):
            yield f"{prefix}{key}"
        if not OmegaConf.is_missing(cfg, key) and not OmegaConf.is_interpolation(cfg, key):
            node = cfg[key]
            if isinstance(node, DictConfig):
                yield from _dotted(node, f"{prefix}{key}.")
