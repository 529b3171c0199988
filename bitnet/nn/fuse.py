"""Packed layers that read the same input (q, k, v; gate, up) as one: their input is quantized once, one kernel runs.

The layers stay where they are and answer as before. Only their bytes move: to one matrix, of which each sees its rows.
So nothing is stored twice, and the fused call and the single ones can be mixed. Each row keeps its own scale, so the
answers are the same bits.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bitnet.nn.packed_linear import PackedLinear
from bitnet.nn.quantized_linear import result_dtype
from bitnet.ops import packed_linear
from bitnet.ops.cpu import cpu_linear
from bitnet.ops.native import Matrix
from bitnet.quant.packed import PackedTensor

BYTES = "weight_packed"  # the buffer that holds them


def fused(layers: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """A function of an input that gives the answers of all ``layers``, one after the other in the last dimension.

    One call of ``torch.ops.bitnet.packed_linear`` where they are packed alike (layout, quantizer of inputs, a bias or
    none); else each is called. Fused again, nothing moves: the parts of a matrix are recognized. Scales and biases are
    copied: a function made before a change of them, or of the layers, answers as they were.

    Args:
        layers: linears with as many input features each.

    Raises:
        InputError: by the function, for an input that the layers refuse.
    """
    matrix = one_matrix(layers)
    if matrix is not None:
        packed, scale, bias, layout, activation, columns = matrix
        in_memory = packed.device.type == "cpu"

        def run(x: Tensor) -> Tensor:
            # In main memory the operator's checks and dispatch take as long as a small product, so what it would run is
            # called at once where ``x``, which alone could be wrong, fits. The rest, gradients too, is the operator's.
            direct = in_memory and not torch.is_grad_enabled() and x.is_floating_point() and x.device == packed.device
            fits = direct and x.dim() > 0 and x.shape[-1] == columns
            y = (cpu_linear if fits else packed_linear)(x, packed, scale, bias, layout, activation)
            return y.to(result_dtype(x))

        return run
    if len(layers) == 1:
        return layers[0]
    return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)


def one_matrix(layers: Sequence[nn.Module]) -> Matrix | None:
    """All ``layers`` as one packed matrix, whose bytes each then sees its rows of; None where they are not alike."""
    first = layers[0]
    if not isinstance(first, PackedLinear) or first._known is None or not all(_alike(first, each) for each in layers):
        return None
    packed, weights = _one_storage(layers), [_weight(each) for each in layers]
    scale = torch.cat([each.scale.expand(each.shape[0], 1) for each in weights])
    biases = [each.bias for each in layers if isinstance(each.bias, Tensor)]
    bias = torch.cat(biases) if biases else None
    return Matrix(packed, scale, bias, weights[0].layout, first._known, weights[0].columns)


def _alike(one: PackedLinear, other: nn.Module) -> bool:
    if not isinstance(other, PackedLinear) or other._known != one._known or (one.bias is None) != (other.bias is None):
        return False
    if one.bias is not None and other.bias is not None and one.bias.dtype != other.bias.dtype:
        return False
    mine, its = _weight(one), _weight(other)
    same_place = mine.packed.device == its.packed.device
    return same_place and (mine.layout, mine.columns) == (its.layout, its.columns)


def _one_storage(layers: Sequence[nn.Module]) -> Tensor:
    """The bytes of all layers, [sum of out, bytes]; afterwards each layer holds its rows of it."""
    parts = [getattr(layer, BYTES) for layer in layers]
    rows, width = sum(each.shape[0] for each in parts), parts[0].shape[1]
    if _adjacent(parts) and not parts[0].is_inference():  # whose changes nobody counts: a kernel could not keep them
        return parts[0].as_strided((rows, width), (width, 1))
    whole = torch.cat(parts)
    for layer, part in zip(layers, whole.split([each.shape[0] for each in parts]), strict=True):
        setattr(layer, BYTES, part)
    return whole


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether the parts lie behind each other in one storage."""
    storage, place = parts[0].untyped_storage().data_ptr(), parts[0].data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.untyped_storage().data_ptr() != storage or part.data_ptr() != place:
            return False
        place += part.numel()
    return True


def _weight(layer: nn.Module) -> PackedTensor:
    weight = layer.weight
    assert isinstance(weight, PackedTensor)
    return weight
