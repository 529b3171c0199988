"""Compiled layers give the bits of eager ones, in one graph; no pass waits for the device."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bitnet import BitLinear, BitLinear158


@pytest.mark.slow
def test_compiled_layers_equal_eager_and_frozen_ones_bit_for_bit_in_one_graph():
    script = Path(__file__).with_name("compiled_layers.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "compiled equals eager", done.stderr


@pytest.mark.parametrize("layer_class", [BitLinear, BitLinear158])
def test_forward_and_backward_never_wait_for_the_device(layer_class):
    with FakeTensorMode():  # a fake tensor has no value: .item(), or a branch on one, would raise
        layer = layer_class(16, 8)
        layer(torch.randn(2, 16)).sum().backward()
    assert layer.weight.grad.shape == (8, 16)
