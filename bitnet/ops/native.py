"""The compiled kernels, called: tensors in, tensor out, through a plain C interface."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from bitnet.errors import InputError

TIERS = ("scalar", "avx2", "avx512", "amx", "neon")  # as numbered in csrc/packed_linear.cpp
BEST_FIRST = ("amx", "avx512", "avx2", "neon", "scalar")
LAYOUTS = {"i2": 0, "t5": 1, "b1": 2}
STEPS = {"absmax": 127.0, "absmax_b1": 128.0}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARALLEL_FROM = 1 << 18  # products of a call: waking a second thread takes as long as 0.2 million of them

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_ARGUMENTS = [
    *(_POINTER, _LONG, _LONG, _LONG, _INT, _FLOAT),  # x, tokens, columns, step, type, steps
    *(_POINTER, _LONG, _LONG, _INT),  # packed, rows, bytes of a row, layout
    *(_POINTER, _LONG, _POINTER, _INT),  # scale, its step, bias, its type
    *(_POINTER, _INT, _INT),  # y, threads, tier
]


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
        self._multiply = library.bitnet_packed_linear
        self._multiply.argtypes, self._multiply.restype = _ARGUMENTS, _INT
        self.decode = library.bitnet_decode  # called by bitnet.ops.decoder
        self.decode.argtypes = [_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _POINTER, _INT, _INT]
        self.decode.restype = _INT
        self._damaged = library.bitnet_damaged_byte
        self._damaged.argtypes, self._damaged.restype = [_POINTER, _LONG, _LONG, _LONG, _INT], _LONG
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
        kind, bias_kind = TYPES.get(x.dtype), 0
        if bias is not None:
            bias_kind = TYPES.get(bias.dtype)
        if kind is None or bias_kind is None:
            wide = bias_kind is None  # added in its own precision, like the reference adds it
            y = self(x.float(), packed, scale, None if wide else bias, layout, activation, tier, threads)
            if wide:
                y.add_(bias)  # type: ignore[arg-type]
            return y.to(x.dtype)
        # This runs in every layer of every token: 1 microsecond is 1 % of a small layer.
        shape, (out, width) = x.shape, packed.shape
        columns = shape[-1]
        rows = x.numel() // columns
        y = torch.empty((*shape[:-1], out), dtype=x.dtype)
        if not x.is_contiguous():
            x = x.contiguous()
        if not packed.is_contiguous():
            packed = packed.contiguous()
        if threads is None:
            threads = torch.get_num_threads() if rows * columns * out >= PARALLEL_FROM else 1
        scale = scale.contiguous()
        bias = bias if bias is None else bias.contiguous()
        failed = self._multiply(
            *(x.data_ptr(), rows, columns, columns, kind, STEPS[activation]),
            *(packed.data_ptr(), out, width, LAYOUTS[layout]),
            *(scale.data_ptr(), scale.shape[0] > 1, None if bias is None else bias.data_ptr(), bias_kind),
            *(y.data_ptr(), threads, TIERS.index(tier or self.tiers[0])),
        )
        if failed == 1:
            raise MemoryError(f"no memory for the quantized inputs of {rows} x {columns}")
        assert not failed, f"the library has no tier {tier}"
        return y

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
