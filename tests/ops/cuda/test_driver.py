"""Launches reach the driver with the values that they hold."""

import ctypes
import threading

import pytest
import torch

from bitnet.ops.cuda import driver
from bitnet.ops.cuda.driver import Module
from bitnet.ops.cuda.plan import Launch


class Driver:
    """Takes what libcuda would."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.calls, self.lookups = status, [], []
        self.contexts = threading.local()  # a thread has a current one, and a new thread none

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

    def cuInit(self, flags):
        return self.status

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return self.status

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 1000 + device.value
        return self.status

    def cuCtxGetCurrent(self, context):
        context._obj.value = getattr(self.contexts, "current", None)
        return self.status

    def cuCtxSetCurrent(self, context):
        self.calls.append(("set", context.value))
        self.contexts.current = context.value
        return self.status


@pytest.fixture
def fake(monkeypatch):
    fake = Driver()
    monkeypatch.setattr(driver, "driver", lambda: fake)
    driver.primary_context.cache_clear()
    yield fake
    driver.primary_context.cache_clear()


def test_a_launch_passes_pointers_numbers_grid_and_stream(monkeypatch):
    fake = Driver()
    monkeypatch.setattr(driver, "driver", lambda: fake)
    module, x = Module(b"cubin"), torch.zeros(3)
    for _ in range(2):
        module.launch(Launch("kernel", (5, 7), 128, (x, None, -9)), stream=1234)
    assert fake.code == b"cubin"
    assert fake.calls == [((5, 7, 1), (128, 1, 1), 0, 1234, [x.data_ptr(), None, -9], None)] * 2
    assert fake.lookups == [b"kernel"]


def test_a_new_thread_gets_the_context_that_torch_has_on_the_device(fake):
    driver.enter_context(0)
    driver.enter_context(0)
    assert fake.calls == [("set", 1000)]
    thread = threading.Thread(target=driver.enter_context, args=(0,))
    thread.start()
    thread.join()
    assert fake.calls == [("set", 1000)] * 2


def test_a_thread_with_another_devices_context_gets_that_of_the_tensors_device(fake):
    driver.enter_context(0)
    driver.enter_context(1)
    driver.enter_context(0)
    assert fake.calls == [("set", 1000), ("set", 1001), ("set", 1000)]


def test_a_full_memory_is_torchs_own_error(monkeypatch):
    monkeypatch.setattr(driver, "driver", lambda: Driver(status=2))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA error 2 in cuModuleLoadData"):
        Module(b"cubin")


def test_an_error_of_the_driver_is_raised(monkeypatch):
    fake = Driver(status=209)
    monkeypatch.setattr(driver, "driver", lambda: fake)
    with pytest.raises(RuntimeError, match="CUDA error 209 in cuModuleLoadData"):
        Module(b"cubin")
