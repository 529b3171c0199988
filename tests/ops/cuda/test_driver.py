"""Launches reach the driver with the values that they hold."""

import ctypes

import pytest
import torch

from bitnet.ops.cuda import driver
from bitnet.ops.cuda.driver import Module
from bitnet.ops.cuda.plan import Launch


class Driver:
    """Takes what libcuda would."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.calls, self.lookups = status, [], []

    def cuModuleLoadData(self, module, code):
        self.code = code
        return self.status

    def cuModuleGetFunction(self, function, module, name):
        self.lookups.append(name)
        return self.status

    def cuLaunchKernel(self, function, x, y, z, threads, ty, tz, shared, stream, pointers, extra):
        types = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        values = [
            ctypes.cast(at, ctypes.POINTER(kind)).contents.value for at, kind in zip(pointers, types, strict=True)
        ]
        self.calls.append(((x, y, z), (threads, ty, tz), shared, stream, values, extra))
        return self.status

    def cuGetErrorString(self, status, text):
        return 0


def test_a_launch_passes_pointers_numbers_grid_and_stream(monkeypatch):
    fake = Driver()
    monkeypatch.setattr(driver, "driver", lambda: fake)
    module, x = Module(b"cubin"), torch.zeros(3)
    for _ in range(2):
        module.launch(Launch("kernel", (5, 7), 128, (x, None, -9)), stream=1234)
    assert fake.code == b"cubin"
    assert fake.calls == [((5, 7, 1), (128, 1, 1), 0, 1234, [x.data_ptr(), None, -9], None)] * 2
    assert fake.lookups == [b"kernel"]


def test_an_error_of_the_driver_is_raised(monkeypatch):
    fake = Driver(status=209)
    monkeypatch.setattr(driver, "driver", lambda: fake)
    with pytest.raises(RuntimeError, match="CUDA error 209 in cuModuleLoadData"):
        Module(b"cubin")
