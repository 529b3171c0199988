"""The compiled kernels, called: tensors in, tensor out, through a plain C interface."""

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet.errors import InputError

TIERS = ("scalar", "avx2", "avx512", "amx", "neon")  # as numbered in csrc/packed_linear.cpp
BEST_FIRST = ("amx", "avx512", "avx2", "neon", "scalar")
LAYOUTS = {"i2": 0, "t5": 1, "b1": 2}
STEPS = {"absmax": 127.0, "absmax_b1": 128.0}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARALLEL_FROM = 1 << 18  # products of a call: waking a second thread takes as long as 0.2 million of them

INT, LONG, FLOAT, DOUBLE = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_double
POINTER = ctypes.c_void_p


class Matrix(NamedTuple):
    """A packed weight and what ``torch.ops.bitnet.packed_linear`` takes with it.

    Attributes:
        packed: codes [out, bytes] uint8.
        scale: float32 [1, 1] or [out, 1].
        bias: [out] or None.
        layout: of the codes.
        activation: quantizer of the inputs.
        columns: input features.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    layout: str
    activation: str
    columns: int


class Linear(ctypes.Structure):
    """A `Matrix` as csrc/products.h lays it out."""

    _fields_ = (
        *(("packed", POINTER), ("scale", POINTER), ("bias", POINTER)),
        *(("rows", LONG), ("columns", LONG), ("row_bytes", LONG), ("scale_step", LONG)),
        *(("layout", INT), ("bias_type", INT), ("steps", FLOAT)),
    )

    @classmethod
    def of(cls, matrix: Matrix) -> "Linear":
        """The addresses of tensors that are contiguous and stay where they are."""
        packed, scale, bias = matrix.packed, matrix.scale, matrix.bias
        return cls(
            *(packed.data_ptr(), scale.data_ptr(), address(bias)),
            *(packed.shape[0], matrix.columns, packed.shape[1], int(scale.shape[0] > 1)),
            *(LAYOUTS[matrix.layout], 0 if bias is None else TYPES[bias.dtype], STEPS[matrix.activation]),
        )


class Native:
    """The kernels of one compiled library.

    Attributes:
        path: the shared library.
        tiers: names of the instruction sets that it holds and this machine runs, the best first.
        parallel: whether it was compiled with OpenMP.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        self.multiply = library.bitnet_linear
        self.multiply.argtypes = [POINTER, POINTER, LONG, INT, POINTER, INT, INT]
        self.multiply.restype = INT
        self.decode = library.bitnet_decode  # called by bitnet.ops.decoder
        self.decode.argtypes = [POINTER, POINTER, POINTER, POINTER, LONG, POINTER, INT, INT]
        self.decode.restype = INT
        self._damaged = library.bitnet_damaged_byte
        self._damaged.argtypes, self._damaged.restype = [POINTER, LONG, LONG, LONG, INT], LONG
        self.tiers = tuple(name for name in BEST_FIRST if library.bitnet_has_tier(TIERS.index(name)))
        self.parallel = bool(library.bitnet_is_parallel())

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        layout: str,
        activation: str,
        tier: str | None = None,
        threads: int | None = None,
    ) -> Tensor:
        """What ``torch.ops.bitnet.packed_linear`` answers; its arguments have passed that operator's checks.

        Args:
            x: inputs [*rows, in]. float32, bfloat16 and float16 are read as they are, others as float32.
            tier: instruction set, by default the best.
            threads: by default PyTorch's.
        """
        bias = None if bias is None else bias.contiguous()
        matrix = Matrix(packed.contiguous(), scale.contiguous(), bias, layout, activation, x.shape[-1])
        return Plan(self, matrix, tier or self.tiers[0])(x, threads)

    def refuse_damaged(self, packed: Tensor, layout: str, columns: int) -> None:
        """Raise InputError for bytes that no codes pack to."""
        packed = packed.contiguous()
        rows, width = packed.shape
        at = self._damaged(packed.data_ptr(), rows, width, columns, LAYOUTS[layout])
        if at >= 0:
            raise InputError(
                f"the bytes are not ternary or sign codes in layout {layout}: the file is damaged or of another layout "
                f"(row {at // width}, byte {at % width} is {int(packed.flatten()[at])})"
            )


class Plan:
    """A product with one matrix, all that depends on the matrix made ready: its call from Python costs half as much.

    Args:
        matrix: contiguous. ``packed`` is the caller's to keep alive (so that a plan can be forgotten with it); scale
            and bias are kept.
    """

    def __init__(self, native: Native, matrix: Matrix, tier: str) -> None:
        bias = matrix.bias
        self._wide = bias if bias is not None and bias.dtype not in TYPES else None  # added in its own precision
        own = matrix._replace(bias=None) if self._wide is not None else matrix
        self._linear, self._kept = Linear.of(own), (matrix.scale, own.bias)
        self._address = ctypes.addressof(self._linear)
        self._multiply, self._tier = native.multiply, TIERS.index(tier)
        self._out, self._columns = matrix.packed.shape[0], matrix.columns
        self._work = self._out * self._columns

    def __call__(self, x: Tensor, threads: int | None = None) -> Tensor:
        """See `Native`."""
        # This runs in every layer of every token: 1 microsecond is 1 % of a small layer.
        kind = TYPES.get(x.dtype)
        if kind is None or (self._wide is not None and kind):
            return self(x.float(), threads).to(x.dtype)
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((*x.shape[:-1], self._out), dtype=x.dtype)
        rows = x.numel() // self._columns
        if threads is None:
            threads = threads_now() if rows * self._work >= PARALLEL_FROM else 1
        failed = self._multiply(self._address, x.data_ptr(), rows, kind, y.data_ptr(), threads, self._tier)
        if failed == 1:
            raise MemoryError(f"no memory for the quantized inputs of {rows} x {self._columns}")
        assert not failed, f"the library has no tier {TIERS[self._tier]}"
        return y if self._wide is None else y.add_(self._wide)


def threads_now() -> int:
    """How many threads a large product runs on: PyTorch's, or one in a process that was forked.

    The other threads of OpenMP stay behind in a fork, and a product that waits for them would never end.
    """
    return 1 if _forked else torch.get_num_threads()


def _after_fork() -> None:
    global _forked
    _forked = True


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin."""
    return None if tensor is None else tensor.data_ptr()
