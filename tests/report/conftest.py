from collections.abc import Callable
from typing import Any

import pytest

from bitnet.report import RunRecord


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    def make(**changes: Any) -> RunRecord:
        fields: dict[str, Any] = {
            "method": "b1.58 latent",
            "model": "nano",
            "data": {"name": "pydocs", "hash": "0123abcd"},
            "bits_per_weight": 32.0,
            "bytes": 12_345_678,
            "nll": 4.25,
            "perplexity": 70.105,
            "bits_per_byte": 1.75,
            "tokens_per_s": 3210.5,
            "train_tokens": 819_200,
            "steps": 400,
            "seed": 7,
            "git_sha": "f" * 40,
            "git_dirty": False,
            "command": "python train.py model=bitnet158",
            "config": {"optim": {"lr": 2e-3, "betas": [0.9, 0.95]}, "ptq": None},
            "versions": {"torch": "2.13.0"},
            "machine": {"cpu": "some processor", "threads": 2, "gpus": []},
            "started": "2026-01-02T03:04:05+00:00",
            "seconds": 61.25,
        }
        return RunRecord(**{**fields, **changes})

    return make
