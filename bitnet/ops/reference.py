"""What every kernel must equal: a quantized linear layer in plain PyTorch.

``y = (q t^T) * (scale_t * scale_q) + bias``, with q the codes of the activations and t those of the weights. Where one
scale serves a whole row of weights the product of codes is an integer, and float32 computes it **exactly**: 2^24 holds
every sum of K products of int8 codes with ternary ones up to K = 131072. So the order of the additions, the number of
threads and the kernel cannot change a bit of the result, and a trained, a frozen and a packed layer agree exactly.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.quant.types import QTensor, QuantizedWeight

EXACT_SUM = 2**24  # float32 holds every integer up to here


def quantized_linear(
    x: QTensor, weight: QuantizedWeight, bias: Float[Tensor, " out"] | None, dtype: torch.dtype
) -> Float[Tensor, "*rows out"]:
    """Codes in, values out: integer product, rescaling and bias in float32 (see above), rounded once to ``dtype``.

    Args:
        x: activations [*rows, in].
        weight: weights [out, in]. Per tensor or per row without zero point the sum is exact as long as it stays below
            2^24; otherwise (groups, zero points, longer sums, weights that are no `QTensor`) both sides are dequantized
            to float32 and the sum rounds.
        bias: added after the rescaling.
        dtype: of the result.
    """
    with torch.autocast(x.qdata.device.type, enabled=False):  # it would round the codes' product to 16 bits
        if isinstance(weight, QTensor) and integer_product_is_exact(x, weight):
            y = matmul_codes(x.qdata, weight.qdata)
            y *= weight.scale.float().reshape(-1) * x.scale
        else:
            y = _matmul_values(x.dequantize(), weight.dequantize())
        if bias is not None:
            y += bias
        return y.to(dtype)


def matmul_codes(q: Tensor, t: Tensor) -> Float[Tensor, "*rows out"]:
    """``q @ t^T`` of int8 codes as float32.

    float32 on a CPU. On CUDA the same product runs on the tensor cores: bfloat16 holds every int8 code, products are
    summed in float32, and ``out_dtype`` keeps the sum from being rounded to bfloat16.
    """
    if q.is_cuda:
        flat = q.reshape(-1, q.shape[-1]).bfloat16()
        y = torch.mm(flat, t.bfloat16().t(), out_dtype=torch.float32).reshape(*q.shape[:-1], -1)
    else:
        y = q.float() @ t.float().t()
    # Of one column nothing is summed, and 0 * -1 stays -0.0, where an integer kernel has 0.
    return torch.where(y == 0, 0.0, y) if q.shape[-1] == 1 else y


@torch.library.custom_op("bitnet::matmul_values", mutates_args=())
def _matmul_values(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T``, opaque to compilers, which would fold a bias into this sum and so round it differently."""
    return x @ weight.t()


@_matmul_values.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def integer_product_is_exact(x: QTensor, weight: QTensor) -> bool:
    """Whether no scale sits inside the sum, no zero point shifts it, and float32 holds every partial sum."""
    one_scale_a_row = weight.group_size is None and x.group_size is None and x.scale.shape[-1] == 1
    no_shift = weight.zero_point is None and x.zero_point is None
    code = weight.levels - 1 if weight.odd else max(weight.levels // 2, 1)
    largest = x.qdata.shape[-1] * 128 * code
    return one_scale_a_row and no_shift and largest <= EXACT_SUM
