"""Machine code on a device: loaded and launched through the CUDA driver, on PyTorch's stream."""

import ctypes
import functools

import torch
from torch import Tensor

from bitnet.ops.cuda.nvrtc import machine_code
from bitnet.ops.cuda.plan import Argument, Launch

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class Module:
    """The kernels on one device; made with that device as the current one.

    Raises:
        RuntimeError: the driver's error; torch.OutOfMemoryError, which is one, where the device's memory is full.
    """

    def __init__(self, code: bytes) -> None:
        self._driver = driver()
        self._code = code  # the driver may look at it again
        self._module = ctypes.c_void_p()
        check(self._driver.cuModuleLoadData(ctypes.byref(self._module), code), "cuModuleLoadData")
        self._functions: dict[str, ctypes.c_void_p] = {}

    def launch(self, launch: Launch, stream: int) -> None:
        """Queue the kernel on ``stream`` (a CUstream): no synchronization, nothing allocated on the device."""
        values = [as_c(each) for each in launch.arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(each) for each in values))
        x, y = launch.grid
        function = self.function(launch.kernel)
        status = self._driver.cuLaunchKernel(function, x, y, 1, launch.threads, 1, 1, 0, stream, pointers, None)
        check(status, launch.kernel)

    def function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            check(self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()), name)
            self._functions[name] = function
        return self._functions[name]


def as_c(argument: Argument) -> ctypes.c_void_p | ctypes.c_int:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_void_p(None) if argument is None else ctypes.c_int(argument)


@functools.cache
def module_on(index: int) -> Module:
    """The kernels on CUDA device ``index``; compiles them (seconds, once) unless they are in the cache.

    Raises:
        BuildError: they cannot be compiled for this device.
        RuntimeError: the driver's error.
    """
    with torch.cuda.device(index):
        torch.cuda.init()
        enter_context(index)
        return Module(machine_code(torch.cuda.get_device_capability(index)))


def enter_context(index: int) -> None:
    """Let this thread's calls of the driver go to CUDA device ``index``, PyTorch's current one.

    The driver has a context a thread, and a new thread has none. PyTorch's calls make one when they need it, and
    ``torch.cuda.device(0)`` in a new thread makes no call, as device 0 is what a thread begins with.
    """
    current, own = ctypes.c_void_p(), primary_context(index)
    check(driver().cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
    if current.value != own.value:
        check(driver().cuCtxSetCurrent(own), "cuCtxSetCurrent")


@functools.cache
def primary_context(index: int) -> ctypes.c_void_p:
    """The context that PyTorch, and every library on CUDA's runtime, uses on CUDA device ``index``."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    check(driver().cuInit(0), "cuInit")
    check(driver().cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    return context


@functools.cache
def driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")  # torch has it already
    library.cuLaunchKernel.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    return library


def check(status: int, what: str) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        kind = torch.OutOfMemoryError if status == OUT_OF_MEMORY else RuntimeError
        raise kind(f"CUDA error {status} in {what}: {reason}")
