"""A Hydra sweeper for arms that differ in several keys: cells are the union of grids, and finished ones are left alone.

Hydra's own sweeper runs one grid. A comparison of methods is no grid: each has options of its own. Here each entry of
``hydra.sweeper.grids`` is a grid in the words of a command line, and the sweep runs all of them:

    qat:  [+experiment=qat158,qat1, "optim.lr=3e-4,1e-3"]     4 cells
    gptq: [+experiment=ptq, ptq=gptq, "ptq.bits=4,3,2"]       3 cells

Each cell is what ``python train.py`` would do with the same words. Its folder carries its name, not a number, so that
cells can be added to a sweep later. This module is in ``hydra_plugins`` because Hydra takes plugins from there alone.
"""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobStatus
from omegaconf import DictConfig, flag_override, open_dict

from bitnet.errors import InputError
from bitnet.experiment.cells import CELLS, RUN, SETTINGS, cell_name, is_finished
from bitnet.files import atomic_file

SWEEPER = ("hydra.sweeper.", "hydra/sweeper")


@dataclass
class GridsConf:
    _target_: str = "hydra_plugins.bitnet_sweeper.GridsSweeper"
    grids: dict[str, list[str]] = field(default_factory=dict)  # name: overrides, several values after commas
    only: list[str] = field(default_factory=lambda: ["*"])  # patterns of the cells' names: run these alone


ConfigStore.instance().store(group="hydra/sweeper", name="grids", node=GridsConf, provider="bitnet")


class GridsSweeper(BasicSweeper):
    """Runs the cells of all ``grids`` that are not finished; the launcher decides how many at once and where."""

    def __init__(self, grids: Mapping[str, Sequence[str]], only: Sequence[str]) -> None:
        super().__init__(max_batch_size=None)
        self.grids = {name: list(grid) for name, grid in grids.items() if grid}
        self.only = list(only)

    def sweep(self, arguments: list[str]) -> Any:
        """Run what is left to do.

        Raises:
            InputError: two cells are the same, a pattern matches none, one was run with other settings before, or some
                failed.
        """
        assert self.config is not None
        assert self.launcher is not None
        _keep_to_oneself(self.config)
        found = _chosen(self._cells(arguments), self.only)
        folder = Path(self.config.hydra.sweep.dir)
        settings = {name: self._settings(overrides) for name, overrides in found.items()}
        if self.config.get("dry_run"):
            return _list_cells(found, settings)
        finished = [name for name in found if is_finished(folder / name, settings[name])]
        started = [name for name in found if (folder / name / RUN / SETTINGS).exists()]
        left = [name for name in found if name not in finished]
        print(
            f"{len(found)} cells in {folder}: {len(finished)} finished before, "
            f"{len(set(started) - set(finished))} to go on with, {len(set(left) - set(started))} new",
            flush=True,
        )
        _note_cells(folder, found)
        jobs = [[*found[name], f"hydra.sweep.subdir='{name}'"] for name in left]
        results = self.launcher.launch(jobs, initial_job_idx=0) if jobs else []
        failed = sum(result.status != JobStatus.COMPLETED for result in results)
        if failed:
            raise InputError(
                f"{failed} of {len(found)} cells failed: they are listed above, and the same command tries again"
            )
        return results

    def _cells(self, arguments: Sequence[str]) -> dict[str, list[str]]:
        """The overrides of every cell, by its name."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = parser.parse_overrides(list(arguments))
        grids = {name: parser.parse_overrides(grid) for name, grid in self.grids.items()}
        if not grids:
            raise InputError("hydra/sweeper=grids needs grids: give hydra.sweeper.grids, or +experiment=compare")
        somewhere = {_key(each) for grid in grids.values() for each in grid}
        found: dict[str, list[str]] = {}
        for grid in grids.values():
            own = {_key(each) for each in grid}
            for overrides, words in _grid_cells(grid, [g for g in given if _key(g) in own or _key(g) not in somewhere]):
                if (name := cell_name(words)) in found:
                    raise InputError(f"the sweep has the cell {name} ({' '.join(words)}) twice: change one of them")
                found[name] = overrides
        return found

    def _settings(self, overrides: Sequence[str]) -> DictConfig:
        """What a cell's run is given; composing it refuses keys and choices that do not exist."""
        assert self.config is not None
        assert self.hydra_context is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg


def _keep_to_oneself(config: DictConfig) -> None:
    """Take what the command line says of the sweeper from what jobs are composed with: a cell has no such keys."""
    words = config.hydra.overrides.hydra
    with flag_override(config, "readonly", False):
        config.hydra.overrides.hydra = [each for each in words if not each.lstrip("+~").startswith(SWEEPER)]


def _chosen(cells: Mapping[str, list[str]], patterns: Sequence[str]) -> dict[str, list[str]]:
    for pattern in patterns:
        if not fnmatch.filter(cells, pattern):
            raise InputError(f"hydra.sweeper.only: no cell is called {pattern}: there are {', '.join(cells)}")
    return {name: words for name, words in cells.items() if any(fnmatch.fnmatchcase(name, each) for each in patterns)}


def _grid_cells(grid: Sequence[Override], given: Sequence[Override]) -> list[tuple[list[str], list[str]]]:
    """A grid's cells: all overrides, and of these the ones that tell a cell from others.

    What the command line gives counts, except for the experiment: there it names the sweep, here the cell's own.
    """
    command = {_key(each): each for each in given if _key(each) != "experiment"}
    merged = {_key(each): each for each in grid} | command
    telling = {_key(each) for each in grid} | {key for key, each in command.items() if each.is_sweep_override()}
    cells = BasicSweeper.split_arguments(list(merged.values()), None)[0]
    return [(cell, [word for word, key in zip(cell, merged, strict=True) if key in telling]) for cell in cells]


def _key(override: Override) -> str:
    package = f"@{override.package}" if override.package else ""
    return f"{override.key_or_group}{package}"


def _note_cells(folder: Path, found: Mapping[str, list[str]]) -> None:
    """Add the cells to those that the sweep's folder lists."""
    path = folder / CELLS
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(before | dict(found), indent=1) + "\n", encoding="utf-8")


def _list_cells(found: Mapping[str, list[str]], settings: Mapping[str, DictConfig]) -> list[Any]:
    """Print each cell as the command that it is; refuse settings that cannot be run."""
    from bitnet.experiment.settings import check

    common = [word for word in next(iter(found.values())) if all(word in words for words in found.values())]
    print(f"{len(found)} cells: python train.py {' '.join(common)} and for")
    for name, words in found.items():
        check(settings[name])
        print(f"  {name}: {' '.join(word for word in words if word not in common)}")
    return []
