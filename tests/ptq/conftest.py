import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path: this is where toy_models.py is found

import pytest
import torch
from torch import Tensor
from toy_models import tiny_gpt2, tiny_llama
from transformers import PreTrainedModel


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture
def gpt2() -> PreTrainedModel:
    return tiny_gpt2()


@pytest.fixture
def text() -> Tensor:
    """Calibration windows; the last batch of 8 is a short one."""
    return torch.randint(0, 60, (20, 24), generator=torch.Generator().manual_seed(3))
