"""Finds the toy model, and silences Lightning's remarks on a toy set-up, which are no concern of these tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for toy_training


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for remark in (
            "ignore:The '.*_dataloader' does not have many workers",
            "ignore:Your `IterableDataset` has `__len__` defined",
            "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
            "ignore:You're resuming from a checkpoint that ended before the epoch ended",
        ):
            item.add_marker(pytest.mark.filterwarnings(remark))
