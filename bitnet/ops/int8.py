"""Without compiled kernels: codes as int8, multiplied by PyTorch's own integer product.

Unpacked codes take a byte a weight beside the packed ones. They are kept as long as the packed weight lives and is not
changed.
"""

import torch
from torch import Tensor

from bitnet.ops.activations import ACTIVATIONS
from bitnet.ops.remembered import Remembered
from bitnet.quant.packing import unpack

_unpacked = Remembered[Tensor](uncounted=False)


def int8_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: str, activation: str) -> Tensor:
    """What ``torch.ops.bitnet.packed_linear`` answers; its arguments have passed that operator's checks."""
    columns = x.shape[-1]
    codes = _unpacked.get(packed, (layout, columns), lambda: unpack(packed, layout, columns))
    inputs = ACTIVATIONS[activation](x)
    y = torch._int_mm(inputs.qdata.reshape(-1, columns), codes.t()).float().reshape(*x.shape[:-1], packed.shape[0])
    y *= scale.reshape(-1) * inputs.scale
    if bias is not None:
        y += bias
    return y.to(x.dtype)
