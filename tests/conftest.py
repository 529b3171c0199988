"""Settings that every test shares: no network, few threads, shapes checked."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("bitnet", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("bitnet")
torch.set_num_threads(1)  # the number of threads changes sums: tests that compare bits need it fixed


@pytest.fixture(autouse=True)
def _same_randomness_for_every_test() -> None:
    torch.manual_seed(0)
