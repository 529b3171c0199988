"""Settings that every test shares: no network, few threads, shapes checked."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook(["bitnet.quant", "bitnet.ops"], "beartype.beartype")  # before their import

hypothesis.settings.register_profile("bitnet", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("bitnet")
torch.set_num_threads(1)  # the number of threads changes sums: tests that compare bits need it fixed


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No check of shapes and types: for arguments that are wrong on purpose."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _same_randomness_for_every_test() -> None:
    torch.manual_seed(0)
