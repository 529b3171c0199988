"""Hydra's refusals in one line, with what was probably meant."""

import difflib
import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException


def one_line(error: Exception, config_directory: Path) -> str:
    """The message of ``error`` as one line; a misspelt key or choice comes with its likeliest meaning."""
    text = str(error)
    if choice := re.search(r"Could not find '([\w./-]+)'\n\nAvailable options in '([\w/]+)':\n((?:\t.*\n?)+)", text):
        group, name = choice[2], choice[1].removeprefix(f"{choice[2]}/")
        return f"{group}={name} is no choice{_hint(name, [line.strip() for line in choice[3].splitlines()])}"
    if key := re.search(r"Could not override '([\w./@-]+)'", text):
        return f"there is no key {key[1]!r}{_hint(key[1], _keys(config_directory))}"
    return " ".join(text.split("\n\n")[0].split())


def _hint(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else f": there are {', '.join(known[:12])}; see train.py --help"


def _keys(config_directory: Path) -> list[str]:
    """Every dotted key of the default configuration."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory.absolute()), version_base="1.3"):
            return list(_dotted(compose("config"), ""))
    except (HydraException, OmegaConfBaseException):
        return []  # the configuration itself is broken: the message of the first error says how


def _dotted(cfg: DictConfig, prefix: str):
    for key in cfg:
        yield f"{prefix}{key}"
        node = None if cfg._get_node(key)._is_interpolation() else cfg.get(key) if not _missing(cfg, key) else None
        if isinstance(node, DictConfig):
            yield from _dotted(node, f"{prefix}{key}.")


def _missing(cfg: DictConfig, key) -> bool:
    from omegaconf import OmegaConf

    return OmegaConf.is_missing(cfg, key)
