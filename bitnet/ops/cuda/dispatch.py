"""What ``torch.ops.bitnet.packed_linear`` runs on where tensors are on an NVIDIA GPU.

The kernels of ``packed_linear.cu``, where they can be compiled for the device and answer like the reference there on a
few small problems; else the reference in plain PyTorch, which a warning says once. Both answer the same bits.

The first call with a weight re-orders it for the kernels (as long as the weight lives, that copy of two bits a weight
is kept beside it) and waits for the device. Later calls do not wait, allocate only through PyTorch's allocator, and run
on the current stream, so that they can be captured into a CUDA graph: `prepare` does the first call's work beforehand,
and `weights_used` gives what the graph must keep.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ops.build import BuildError
from bitnet.ops.cuda.driver import enter_context, module_on
from bitnet.ops.cuda.layout import Prepacked, prepack
from bitnet.ops.cuda.plan import DTYPES, EXACT_COLUMNS, MULTIPLICATIONS, Launch, launches
from bitnet.ops.packed_linear import LIBRARY, check_arguments, reference_linear
from bitnet.ops.remembered import Remembered
from bitnet.quant.packing import pack, unpack

# A change that PyTorch does not count would go unnoticed, and the old weight would answer.
_prepacked = Remembered[Prepacked](uncounted=False)
_collecting: ContextVar[list[Prepacked] | None] = ContextVar("_collecting", default=None)


def cuda_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: str, activation: str = "absmax"
) -> Tensor:
    """The operator on a GPU."""
    check_arguments(x, packed, scale, bias, layout, activation)
    if x.shape[-1] > EXACT_COLUMNS or fault_on(x.device.index) is not None:
        return reference_linear(x, packed, scale, bias, layout, activation)
    return kernel_linear(x, packed, scale, bias, layout, activation)


def kernel_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: str,
    activation: str,
    kernel: str | None = None,
) -> Tensor:
    """The operator by the kernels, for arguments that have passed its checks.

    Args:
        x: inputs; float32, float16 and bfloat16 are read as they are, others as float32.
        kernel: which one multiplies, one of ``MULTIPLICATIONS``; by default what suits the shape.

    Raises:
        InputError: a weight's first call while a CUDA graph is captured.
    """
    wide = bias is not None and bias.dtype not in DTYPES  # added in its own precision, like the reference adds it
    if x.dtype not in DTYPES or wide:
        y = kernel_linear(x.float(), packed, scale, None if wide else bias, layout, activation, kernel)
        if bias is not None and wide:
            y += bias
        return y.to(x.dtype)
    y = x.new_empty((*x.shape[:-1], packed.shape[0]))
    if y.numel() == 0:
        return y
    weight = prepacked(packed, layout, x.shape[-1])
    tokens, results = x.reshape(-1, x.shape[-1]).contiguous(), y.view(-1, packed.shape[0])
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    occupied = multiprocessors(x.device)
    run(launches(tokens, weight, scale, bias, results, activation, occupied, kernel), x.device)
    return y


def run(queue: list[Launch], device: torch.device) -> None:
    """Queue the kernels on the device's current stream."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        module = module_on(device.index)
        enter_context(device.index)
        for each in queue:
            module.launch(each, stream)


def prepare(packed: Tensor, layout: str, columns: int) -> None:
    """Do what the first call with this weight would: compile, check the kernels, re-order the weight; wait for it.

    Raises:
        InputError: bytes that no codes pack to.
    """
    if columns <= EXACT_COLUMNS and fault_on(packed.device.index) is None:
        prepacked(packed, layout, columns)


@contextmanager
def weights_used() -> Iterator[list[Prepacked]]:
    """Collects the re-ordered weights that calls inside it read.

    A CUDA graph reads their memory in every replay, and must keep them: a weight that is changed or goes takes its
    re-ordered copy along, and the graph would read what comes after it. ::

        with weights_used() as kept:      # the calls before the capture will do
            model(x)
    """
    kept = list[Prepacked]()
    token = _collecting.set(kept)
    try:
        yield kept
    finally:
        _collecting.reset(token)


def prepacked(packed: Tensor, layout: str, columns: int) -> Prepacked:
    """The weight in the kernels' order, made once and kept as long as ``packed`` lives and stays as it is.

    Not kept where inference mode has made ``packed``: PyTorch counts no changes of such a tensor. A warning says so.

    Raises:
        InputError: bytes that no codes pack to, or a first call while a CUDA graph is captured.
    """

    def make() -> Prepacked:
        if packed.is_inference():
            warnings.warn(
                "a packed weight that was made in torch.inference_mode() is re-ordered in every call, which takes many "
                "times as long as multiplying: load the model, and move it to the device, outside of inference mode",
                RuntimeWarning,
                stacklevel=2,
            )
        refuse_capture(packed.device)
        made = prepack(unpack(packed, layout, columns))
        if packed.is_cuda:
            torch.cuda.current_stream(packed.device).synchronize()  # other streams may use it next
        return made

    weight, kept = _prepacked.get(packed, (layout, columns), make), _collecting.get()
    if kept is not None:
        kept.append(weight)
    return weight


def refuse_capture(device: torch.device) -> None:
    """Raise InputError while the current stream is captured: for work that waits for the device."""
    if capturing(device):
        raise InputError(
            "expected a weight that has been used before a CUDA graph is captured, got a new one: call the model "
            "once, or bitnet.ops.cuda.prepare for every packed weight, before capturing; and no weight made in "
            "torch.inference_mode()"
        )


def capturing(device: torch.device) -> bool:
    """Whether the current stream, of ``device`` or of the current device, is captured into a CUDA graph."""
    if not torch.cuda.is_initialized():
        return False
    if torch.cuda.is_current_stream_capturing():  # asks for the current device
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def fault_on(index: int) -> str | None:
    """Why the kernels do not run on CUDA device ``index``, None where they do; said once by a warning.

    Every kernel has to answer there like the reference on the CPU, on small problems: an architecture or a compiler
    that this project could not test must not answer for a model.

    Raises:
        InputError: a first call while a CUDA graph is captured.
        torch.OutOfMemoryError: the device's memory is full, which says nothing about the kernels: the next call asks
            again.
    """
    device = torch.device("cuda", index)
    refuse_capture(device)
    try:
        with torch.inference_mode(False):  # its weights are to be re-ordered once
            fault = wrong_on(device)
    except torch.OutOfMemoryError:
        raise
    except (BuildError, OSError, RuntimeError) as error:
        fault = str(error)
    if fault is not None:
        warnings.warn(
            f"packed layers run in plain PyTorch on CUDA device {index}, many times slower than the kernels: {fault}",
            RuntimeWarning,
            stacklevel=2,
        )
    return fault


def wrong_on(device: torch.device) -> str | None:
    """What is wrong with the kernels' answers on ``device``, None if all are the reference's."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (150, 400), generator=draw, dtype=torch.int8)
    layer = pack(codes, "i2"), torch.rand(150, 1, generator=draw), torch.randn(150, generator=draw)
    packed, scale, bias = (each.to(device) for each in layer)
    for tokens in (1, 7, 36):
        for dtype in DTYPES:
            x = torch.randn(tokens, 400, generator=draw).to(dtype)
            right = reference_linear(x, *layer, "i2", "absmax")
            for kernel in MULTIPLICATIONS:
                found = kernel_linear(x.to(device), packed, scale, bias, "i2", "absmax", kernel)
                if not torch.equal(found.cpu(), right):
                    return f"{kernel} answers wrongly for {tokens} tokens in {dtype}: this is a bug, please report it"
    return None


def states() -> list[tuple[str, str]]:
    """(device, what packed layers run on there) of every CUDA device; empty without one."""
    found = list[tuple[str, str]]()
    for index in range(torch.cuda.device_count()):
        fault = fault_on(index)
        state = "kernels, equal to the reference" if fault is None else f"reference: {fault}"
        found.append((f"cuda:{index} {torch.cuda.get_device_name(index)}", state))
    return found


LIBRARY.impl("packed_linear", cuda_linear, "CUDA")
