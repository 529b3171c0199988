"""Which kernels make a layer, on which grids, with which arguments: plain data, for a GPU and for the emulator."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.ops.cuda.layout import COLUMNS, ROWS, Prepacked

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the enum of packed_linear.cu
STEPS = {"absmax": 127, "absmax_b1": 128}
EXACT_COLUMNS = 2**24 // 128  # float32 holds every sum of so many products; beyond, the reference's rounding is its own

# Tokens up to which a kernel is chosen that reads a weight once for a few of them: by instructions, waiting for a GPU
# that measures it (benchmarks/gpu.py).
FEW_TOKENS = 64
# A warp has two loads of 512 bytes under way. A multiprocessor of an H100, which reads 3.35 TB/s some 0.45 microseconds
# after asking, needs 11.5 KB under way; twice that leaves room for other delays.
LEAST_WARPS, WARPS_A_MULTIPROCESSOR = 4, 24
CODE_TOKENS = 128  # activations are stored in blocks of so many tokens

Argument = Tensor | int | None


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel call: grid (x, y), threads a block, and arguments in the kernel's order (None: a null pointer)."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Few:
    """A kernel for few tokens: a block computes 16 outputs of ``tokens`` of them with up to ``most_warps`` warps."""

    tokens: int
    most_warps: int = 16

    def grid(self, tokens: int, outputs: int) -> tuple[int, int]:
        return -(-outputs // ROWS), -(-tokens // self.tokens)

    def threads(self, blocks: int, tiles: int, multiprocessors: int) -> int:
        """Twice and twice again the least as long as the device has room and every warp two tiles of columns."""
        warps = LEAST_WARPS
        while (
            2 * warps <= min(self.most_warps, tiles // 2) and blocks * warps < multiprocessors * WARPS_A_MULTIPROCESSOR
        ):
            warps *= 2
        return 32 * warps


@dataclass(frozen=True, slots=True)
class Tiles:
    """A kernel for many tokens: a block computes ``outputs`` outputs of ``tokens`` tokens."""

    outputs: int
    tokens: int

    def grid(self, tokens: int, outputs: int) -> tuple[int, int]:
        return -(-tokens // self.tokens), -(-outputs // self.outputs)

    def threads(self, blocks: int, tiles: int, multiprocessors: int) -> int:
        return 128


LARGE = Tiles(outputs=128, tokens=64)
MULTIPLICATIONS = {
    "multiply_1": Few(1),
    "multiply_2": Few(2),
    "multiply_8": Few(8),
    "multiply_16": Few(16),
    "multiply_32": Few(32, most_warps=8),
    "multiply_tiles_64x32": Tiles(outputs=64, tokens=32),
    "multiply_tiles_128x64": LARGE,
}
QUANTIZE_THREADS = 256


def launches(
    x: Float[Tensor, "tokens cols"],
    weight: Prepacked,
    scale: Float[Tensor, "scale_rows 1"],
    bias: Float[Tensor, " rows"] | None,
    y: Float[Tensor, "tokens rows"],
    activation: str,
    multiprocessors: int,
    kernel: str | None = None,
) -> list[Launch]:
    """The kernels that write ``activation(x) @ weight^T * scale + bias`` to ``y``; allocates their workspace.

    Args:
        x: inputs, contiguous, at least one token; float32, float16 or bfloat16, as ``bias`` and ``y``.
        weight: of ``EXACT_COLUMNS`` columns at most.
        scale: float32 [1, 1] or [rows, 1], contiguous.
        bias: contiguous.
        y: receives the outputs, in the dtype of ``x``; contiguous.
        activation: "absmax" or "absmax_b1".
        multiprocessors: of the device; decides between large and small tiles.
        kernel: which one multiplies, one of ``MULTIPLICATIONS``; None chooses by the shape.
    """
    tokens, outputs, tiles = x.shape[0], weight.rows, weight.tiles.shape[1]
    codes = x.new_empty(-(-tokens // CODE_TOKENS) * tiles * CODE_TOKENS * COLUMNS, dtype=torch.int8)
    sums = x.new_empty(tokens, dtype=torch.int32)
    scales = x.new_empty(tokens, dtype=torch.float32)
    dtype, bias_dtype = DTYPES[x.dtype], DTYPES[x.dtype if bias is None else bias.dtype]
    inputs = (x, codes, sums, scales, weight.columns, tiles, dtype, STEPS[activation])
    layer = (sums, scales, scale, bias, y, tokens, outputs, int(scale.shape[0] > 1), bias_dtype, dtype)
    kernel = multiplication(tokens, outputs, multiprocessors) if kernel is None else kernel
    form = MULTIPLICATIONS[kernel]
    grid = form.grid(tokens, outputs)
    threads = form.threads(grid[0] * grid[1], tiles, multiprocessors)
    return [
        Launch("quantize_rows", (tokens, 1), QUANTIZE_THREADS, inputs),
        Launch(kernel, grid, threads, (weight.tiles, codes, tiles, *layer)),
    ]


def multiplication(tokens: int, outputs: int, multiprocessors: int) -> str:
    """The kernel that multiplies: for few tokens the one whose blocks they fill, else the largest tiles that occupy
    every multiprocessor."""
    if tokens <= FEW_TOKENS:
        return f"multiply_{next(each for each in (1, 2, 8, 16, 32) if each >= min(tokens, 32))}"
    across, down = LARGE.grid(tokens, outputs)
    return "multiply_tiles_128x64" if across * down >= multiprocessors else "multiply_tiles_64x32"
