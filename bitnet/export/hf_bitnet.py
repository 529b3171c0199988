"""The two packed forms of transformers' ``quant_method: bitnet``: bytes, scales, the entry in config.json, what fits.

::

    weight        uint8 [out/4, in]   byte row p holds rows p, p + out/4, p + 2 out/4, p + 3 out/4
                                      in bits 1:0, 3:2, 5:4, 7:6; code t + 1, never 3
    weight_scale  float32 [1]         its meaning depends on the class that reads it, and nothing in the tensor tells:

    bitlinear       DIVIDES by it: 1/m is stored
    autobitlinear   MULTIPLIES by it: m is stored. A bias would be multiplied too, so it takes none

m is the multiplier of the codes (mean|W|). ``1 / (1 / m)`` in float32 is m in 88 of 100 cases and its neighbour in the
others (measured on 1e6 scales: at most 8.4e-8 from m), hence `SCALE_ROUNDING`. In bfloat16 it would be 0.4 % off, so
the scale is stored in float32 whatever the dtype of the rest; transformers rounds it to that dtype when it loads it.
"""

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.nn import BitLinear, QuantizedEmbedding, QuantizedModule
from bitnet.quant import LearnedScale, PackedTensor, QTensor, absmax, absmean_ternary
from bitnet.quant.packed import is_packable

ROWS_A_BYTE = 4
SCALE_ROUNDING = {"bitlinear": 2**-23, "autobitlinear": 0.0}  # of m, relative, from writing and reading it
LARGEST_SCALE = 16.0  # trained weights have a mean magnitude of 0.01 to 2; 1/m of one of them lies above this
SMALLEST_SCALE = 0.9e-5  # training clamps m at 1e-5


def pack_rows(codes: Int8[Tensor, "out in"]) -> UInt8[Tensor, "bytes in"]:
    """Four rows a byte, as drawn above. ``out`` must be a multiple of 4."""
    assert codes.shape[0] % ROWS_A_BYTE == 0
    digits = (codes + 1).to(torch.uint8).reshape(ROWS_A_BYTE, -1, codes.shape[1])
    packed = torch.zeros_like(digits[0])
    for place, rows in enumerate(digits):
        packed |= rows << 2 * place
    return packed


def unpack_rows(packed: UInt8[Tensor, "bytes in"]) -> Int8[Tensor, "out in"]:
    """The ternary codes.

    Raises:
        InputError: a byte holds the code 3, which no weight has.
    """
    digits = torch.cat([packed >> 2 * place & 3 for place in range(ROWS_A_BYTE)])
    if digits.numel() and int(digits.max()) > 2:
        raise InputError("expected packed ternary codes, got the code 3: the file is damaged, or of another layout")
    return digits.to(torch.int8) - 1


def stored_scale(scale: Tensor, linear_class: str) -> Float[Tensor, "1"]:
    """What a file holds for the multiplier ``scale``, in float32."""
    value = scale.float().reshape(1)
    return 1 / value if linear_class == "bitlinear" else value


def restored_scale(stored: Tensor, linear_class: str) -> Float[Tensor, "1 1"]:
    """The multiplier of the codes, in float32.

    Raises:
        InputError: it is no positive number, or so large or small that it must be the inverse of one.
    """
    if stored.numel() != 1 or not stored.is_floating_point():
        raise InputError(f"expected one scale, got {stored.dtype} {list(stored.shape)}")
    value = stored.float().reshape(1, 1)
    if not bool(torch.isfinite(value) & (value > 0)):
        raise InputError(f"expected a positive scale, got {float(value)}: the file is damaged")
    scale = 1 / value if linear_class == "bitlinear" else value
    if not SMALLEST_SCALE <= float(scale) <= LARGEST_SCALE:
        does = "divides by" if linear_class == "bitlinear" else "multiplies by"
        raise InputError(
            f"{linear_class} {does} the scale {float(value):.3g}, which makes weights of magnitude {float(scale):.3g}: "
            "it looks like the inverse of the right one, or linear_class in config.json is the wrong one of bitlinear "
            "and autobitlinear"
        )
    return scale


def config_entry(linear_class: str, mode: str, left_dense: list[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json."""
    return {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": mode,
        "modules_to_not_convert": left_dense,
    }


def latent_problems(layers: dict[str, nn.Module]) -> list[str]:
    """Why transformers' online layers cannot stand for ``layers``."""
    reasons = {name: [reason] if (reason := _latent_reason(layer)) else [] for name, layer in layers.items()}
    return grouped_by_reason(reasons)


def packed_problems(layers: dict[str, nn.Module], plain: nn.Module, linear_class: str) -> list[str]:
    """Why ``layers`` cannot be stored packed for ``linear_class``.

    Args:
        plain: transformers' own model of the same configuration (it may have no memory): what it would replace.
    """
    return grouped_by_reason(
        {name: _packed_reasons(layer, plain.get_submodule(name), linear_class) for name, layer in layers.items()}
    )


def grouped_by_reason(reasons: dict[str, list[str]]) -> list[str]:
    """One line a reason, naming the first layer that it is true of, and how many more there are."""
    names = defaultdict[str, list[str]](list)
    for name, each in reasons.items():
        for reason in each:
            names[reason].append(name)
    return [f"{of[0]}{f' and {len(of) - 1} more' if len(of) > 1 else ''}: {reason}" for reason, of in names.items()]


def is_b158(layer: nn.Module) -> bool:
    """Whether transformers' ``AutoBitLinear`` computes the same codes: asked of the quantizers, however made."""
    return _latent_reason(layer) is None


def left_dense(model: nn.Module) -> list[str]:
    """Names of the linears that stay as they are."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def _latent_reason(layer: nn.Module) -> str | None:
    if not isinstance(layer, BitLinear):
        return (
            "it is frozen and has no latent weight: export the trained model, or its codes with weights=bitlinear "
            "or weights=autobitlinear"
        )
    probe = _probe(layer.in_features)
    learned = isinstance(layer.quantizer, LearnedScale)  # which fits its own weight alone
    if learned or not _same(layer.quantizer(probe), absmean_ternary(probe)):
        return "its weight is not quantized as in b1.58 (one absmean scale a matrix): use weights=dequantized"
    if layer.activation is None or not _same(layer.activation(probe), absmax(probe)):
        return f"its inputs are not quantized as in b1.58 (int8 absmax a token): {WITHOUT_INPUTS}"
    return None


WITHOUT_INPUTS = "use weights=dequantized, which leaves the quantization of the inputs out"


def _packed_reasons(layer: nn.Module, plain: nn.Module, linear_class: str) -> list[str]:
    if not isinstance(plain, nn.Linear) or isinstance(layer, QuantizedEmbedding):
        return [f"it is a {type(plain).__name__}, transformers packs nn.Linear only: use weights=dequantized"]
    assert isinstance(layer, BitLinear | QuantizedModule)
    reasons = list[str]()
    weight = layer.quantized_weight() if isinstance(layer, BitLinear) else layer.weight
    if isinstance(weight, PackedTensor):
        ternary, scale = weight.layout != "b1", weight.scale
    elif isinstance(weight, QTensor) and is_packable(weight):
        ternary, scale = weight.levels == 3, weight.scale
    else:
        ternary, scale = False, torch.ones(1)
    if not ternary:
        reasons.append("its weight has no ternary codes with one scale: use weights=dequantized, or another format")
    elif scale.numel() != 1:
        reasons.append("it has a scale for each row, the format one for the matrix: use weights=dequantized")
    elif not scale.is_meta and not SMALLEST_SCALE <= float(scale) <= LARGEST_SCALE:  # a dry run has no values
        reasons.append(
            f"its scale lies outside {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}, where a reader takes it for the inverse "
            "of one: use weights=dequantized"
        )
    if plain.out_features % ROWS_A_BYTE:
        reasons.append(
            f"out_features must be a multiple of {ROWS_A_BYTE}, got {plain.out_features}: leave the layer dense "
            "(exclude=) or use weights=dequantized"
        )
    bias = getattr(layer, "bias", None)
    if bias is not None and plain.bias is None:
        reasons.append("it has a bias that its config does not mention, so that transformers would not read it")
    elif bias is not None and linear_class == "autobitlinear":
        reasons.append("autobitlinear would multiply its bias by the scale: use weights=bitlinear")
    activation: Any = layer.activation
    probe = _probe(plain.in_features)
    if activation is None or not _same(activation(probe), absmax(probe)):
        reasons.append(f"its inputs are not quantized as in b1.58 (int8 absmax a token): {WITHOUT_INPUTS}")
    return reasons


def _probe(columns: int) -> Tensor:
    """A matrix on which two quantizers of b1.58 differ if they differ at all: tiny rows, an outlier, normal tails."""
    probe = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    probe[0] *= 1e-7  # below the smallest scale: the clamp shows
    probe[1, 0] = 100.0
    return probe


def _same(one: QTensor, other: QTensor) -> bool:
    return (
        one.levels == other.levels
        and one.zero_point is None
        and torch.equal(one.scale, other.scale)
        and torch.equal(one.qdata, other.qdata)
    )
