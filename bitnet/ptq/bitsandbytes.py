"""bitsandbytes' formats: NF4 and FP4 in blocks, and LLM.int8().

The codes come from bitsandbytes' own functions, so that they are those of anyone else who uses it. It has to be
installed (``pip install bitsandbytes``) for these methods only, and runs on a CPU as well.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq.protocol import LayerStats, Statistic
from bitnet.quant import QTensor, Quantizer

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)  # 32 exists, but not on every device
NESTED_BLOCK = 256  # magnitudes that share a second-level scale


@dataclass(frozen=True, slots=True)
class FourBitBlocks:
    """Codes of 4 bits and a largest magnitude for each block of the flattened matrix: ``codebook[code] * absmax``.

    ::

        byte j = code[2j] << 4 | code[2j + 1]       the matrix row by row; a last odd code leaves the low half unused
        double quantization: absmax = nested_codebook[absmax code] * nested_absmax[of 256 blocks] + nested_mean

    Every tensor counts as stored, the codebooks too: bitsandbytes saves them with each layer.

    Attributes:
        packed: uint8 [ceil(out * in / 2)].
        absmax: float32 [blocks], or uint8 codes of it.
        codebook: float32 [16].
        out_features, in_features: shape of the matrix.
        block_size: weights that share a magnitude.
        format: "nf4" or "fp4".
        nested_absmax, nested_codebook, nested_mean: float32 [ceil(blocks / 256)], [256] and []; None without double
            quantization.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    out_features: int
    in_features: int
    block_size: int
    format: str
    nested_absmax: Tensor | None = None
    nested_codebook: Tensor | None = None
    nested_mean: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    @property
    def bits_per_weight(self) -> float:
        tensors = (self.packed, self.absmax, self.codebook)
        nested = (self.nested_absmax, self.nested_codebook, self.nested_mean)
        stored = sum(8 * each.numel() * each.element_size() for each in (*tensors, *nested) if each is not None)
        return stored / self.shape.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values by bitsandbytes' own function, in float32, rounded once to ``dtype``."""
        functional = _functional()
        nested = None
        if self.nested_absmax is not None:
            nested = functional.QuantState(
                absmax=self.nested_absmax, code=self.nested_codebook, blocksize=NESTED_BLOCK, dtype=torch.float32
            )
        state = functional.QuantState(
            absmax=self.absmax,
            shape=self.shape,
            code=self.codebook,
            blocksize=self.block_size,
            quant_type=self.format,
            dtype=torch.float32,
            offset=self.nested_mean,
            state2=nested,
        )
        return functional.dequantize_4bit(self.packed[:, None], state).to(dtype)


@dataclass(frozen=True, slots=True)
class BitsAndBytes4Bit:
    """NF4 or FP4 of QLoRA: the nearest of 16 values in each block's range.

    Args:
        format: "nf4": quantiles of a normal distribution, with an exact zero; "fp4": sign, two bits of exponent and one
            of mantissa.
        block_size: consecutive weights, across the ends of rows, that share a largest magnitude.
        double_quant: store these in 8 bits, in blocks of 256, instead of float32.

    Source: QLoRA, arXiv:2305.14314, sec. 3.
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.format not in ("nf4", "fp4"):
            raise InputError(f"format must be nf4 or fp4, got {self.format!r}")
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {self.block_size}")

    @property
    def requires(self) -> frozenset[Statistic]:
        return frozenset()

    @property
    def claimed_bits(self) -> float:
        return 4

    def quantize(self, weight: Float[Tensor, "out in"], stats: LayerStats | None) -> FourBitBlocks:
        """Raises:
        InputError: bitsandbytes is missing, or a weight is NaN or infinite.
        """
        values = _finite(weight)
        packed, state = _functional().quantize_4bit(
            values, blocksize=self.block_size, compress_statistics=self.double_quant, quant_type=self.format
        )
        nested = state.state2
        return FourBitBlocks(
            packed=packed.flatten(),
            absmax=state.absmax,
            codebook=state.code,
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            block_size=self.block_size,
            format=self.format,
            nested_absmax=nested.absmax if nested else None,
            nested_codebook=nested.code if nested else None,
            nested_mean=state.offset if nested else None,
        )


@dataclass(frozen=True, slots=True)
class LLMInt8:
    """LLM.int8(): a scale a row for the weights, and, where inputs are quantized too, one a token beside outliers.

    Args:
        threshold: features of the inputs with a larger magnitude anywhere in the batch stay in float; 0: none do.

    Source: Dettmers et al., arXiv:2208.07339, sec. 3.
    """

    threshold: float = 6.0

    quantizes_activations = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < float("inf"):
            raise InputError(f"threshold must be 0 (no outliers) or a positive magnitude, got {self.threshold}")

    @property
    def requires(self) -> frozenset[Statistic]:
        return frozenset()

    @property
    def claimed_bits(self) -> float:
        return 8

    @property
    def activation(self) -> Quantizer:
        """What quantizes the inputs of the layer."""
        return MixedPrecisionInt8(self.threshold)

    def quantize(self, weight: Float[Tensor, "out in"], stats: LayerStats | None) -> QTensor:
        """Codes as bitsandbytes computes them; scales float32 [out, 1].

        Raises:
            InputError: bitsandbytes is missing, or a weight is NaN or infinite.
        """
        values = _finite(weight)
        empty = values.abs().amax(1, keepdim=True) == 0
        codes, largest, _ = _functional().int8_vectorwise_quant(values.masked_fill(empty, 1.0))
        # A row of zeros would be divided by zero: it gets the smallest scale that other quantizers give, and zeros.
        scale = (largest[:, None] / 127).masked_fill(empty, 1e-5 / 127)
        return QTensor(codes.masked_fill(empty, 0), scale, levels=255)


@dataclass(frozen=True, slots=True)
class MixedQTensor(QTensor):
    """int8 codes a token, and features that stay in float: their codes are 0, their values in ``outliers``."""

    outliers: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = QTensor.dequantize(self)
        return (values if self.outliers is None else values + self.outliers).to(dtype)


@dataclass(frozen=True, slots=True)
class MixedPrecisionInt8:
    """The inputs' side of LLM.int8(): int8 to each token's largest magnitude, outlier features in float32.

    A feature is an outlier for the whole batch as soon as one token has a magnitude of ``threshold`` there. An outlier
    counts for no token's scale. The group size is set, to all columns, because a product of codes alone would miss the
    outliers: `bitnet.ops.quantized_linear` then multiplies values.
    """

    threshold: float = 6.0

    def __call__(self, x: Float[Tensor, "*rows cols"]) -> MixedQTensor:
        values = x.detach().float()
        large = values.abs() >= (self.threshold or float("inf"))
        columns = large.flatten(0, -2).any(0)
        largest = values.masked_fill(large, 0.0).abs().amax(-1, keepdim=True).clamp(min=1e-5)
        codes = (values.masked_fill(columns, 0.0) * (127.0 / largest)).round().to(torch.int8)  # as bitsandbytes rounds
        outliers = values.masked_fill(~columns, 0.0)
        return MixedQTensor(codes, largest / 127, levels=255, group_size=x.shape[-1], outliers=outliers)


def _finite(weight: Tensor) -> Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise InputError("the weight holds NaN or infinity: check the checkpoint")
    return weight.detach().float().contiguous()


def _functional() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise InputError(
            "NF4, FP4 and LLM.int8() need bitsandbytes, which is not installed: pip install bitsandbytes"
        ) from error
    return functional
