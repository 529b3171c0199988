"""The step of one token as one call of the compiled kernels, for models whose layers are all packed.

`bitnet.generation.step` computes the same with PyTorch's operators: on other devices, in other dtypes, for layers that
are not packed, and where nothing is compiled. Norms and attention round in another order there, as they do in
transformers; the products of codes are the same bits.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitnet.generation.step import Function, OneToken
from bitnet.nn.fuse import one_matrix
from bitnet.ops import choice
from bitnet.ops.cpu import LONGEST_ROW
from bitnet.ops.decoder import Decoder, Layer, Norm, Shape
from bitnet.ops.native import Matrix

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

ACTIVATIONS = {"ReLUSquaredActivation": "relu2", "SiLUActivation": "silu", "SiLU": "silu"}  # transformers' classes


class NativeStep:
    """A token in, logits out, its keys and values written into the cache's memory.

    Args:
        decoder: the model's layers; with the head, or without one where ``head`` is given.
        otherwise: what runs under autocast, which changes dtypes.
    """

    def __init__(self, model: "PreTrainedModel", decoder: Decoder, head: Function | None, otherwise: OneToken) -> None:
        body: Any = model.model
        self._embed, self._rotary = body.embed_tokens, body.rotary_emb
        self._decoder, self._head, self._otherwise = decoder, head, otherwise
        self._rooms: list[tuple[Tensor, Tensor]] = []

    def __call__(self, ids: Tensor, cache: "DynamicCache") -> Tensor:
        """Logits [1, 1, vocabulary] for ids [1, 1]; every layer of ``cache`` is a `GrowingLayer`."""
        if torch.is_autocast_enabled("cpu"):
            return self._otherwise(ids, cache)
        position = cache.get_seq_length()
        x = self._embed(ids)
        cos, sin = self._rotary(x, torch.full_like(ids, position))
        layers: list[Any] = cache.layers
        rooms = [layer.extend() for layer in layers]
        if not self._rooms or any(new[0] is not old[0] for new, old in zip(rooms, self._rooms, strict=True)):
            self._decoder.use(rooms)
            self._rooms = rooms
        y = self._decoder(x, cos, sin, position).view(1, 1, -1)
        return y if self._head is None else self._head(y)


def native_step(model: "PreTrainedModel", otherwise: OneToken) -> NativeStep | None:
    """The step of ``model``, which `bitnet.generation.step.knows`; None where the kernels cannot compute it."""
    body: Any = model.model
    layers = [_layer(each) for each in body.layers]
    shapes = {_shape(each) for each in body.layers}
    norm, known = _norm(body.norm), [each for each in layers if each is not None]
    (shape, *others) = shapes
    if len(known) < len(layers) or not known or others or shape is None or norm is None or not _float32(body):
        return None
    native = choice().native
    if native is None:
        return None
    head: nn.Module = model.lm_head  # type: ignore[assignment]
    own_head = None
    if type(head) is nn.Linear and _suits(head.weight) and (head.bias is None or _suits(head.bias)):
        own_head = head.weight.detach(), None if head.bias is None else head.bias.detach()
    decoder = Decoder(native, choice().name, shape, known, norm, own_head)
    return NativeStep(model, decoder, None if own_head is not None else head, otherwise)


def _layer(layer: Any) -> Layer | None:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = one_matrix([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up = one_matrix([mlp.gate_proj, mlp.up_proj])
    o, down = one_matrix([attention.o_proj]), one_matrix([mlp.down_proj])
    norm, norm_2 = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    o_norm, down_norm = getattr(attention, "attn_sub_norm", None), getattr(mlp, "ffn_sub_norm", None)
    if not (qkv and gate_up and o and down and norm and norm_2):
        return None
    if not all(map(_runs, (qkv, gate_up, o, down))) or mlp.gate_proj.out_features != mlp.up_proj.out_features:
        return None
    subs = _norm(o_norm), _norm(down_norm)
    if (subs[0] is None) != (o_norm is None) or (subs[1] is None) != (down_norm is None):
        return None
    return Layer(norm, qkv, subs[0], o, norm_2, gate_up, subs[1], down)


def _shape(layer: Any) -> Shape | None:
    attention = layer.self_attn
    size, activation = attention.head_dim, ACTIVATIONS.get(type(layer.mlp.act_fn).__name__)
    heads, key_heads = attention.q_proj.out_features // size, attention.k_proj.out_features // size
    return None if activation is None else Shape(heads, key_heads, size, attention.scaling, activation)


def _norm(module: Any) -> Norm | None:
    if module is None or not _suits(module.weight):
        return None
    return Norm(module.weight.detach(), float(module.variance_epsilon))


def _runs(matrix: Matrix) -> bool:
    parts = [matrix.packed, matrix.scale] + ([] if matrix.bias is None else [matrix.bias])
    short = matrix.columns <= LONGEST_ROW
    return short and all(each.device.type == "cpu" and each.is_contiguous() for each in parts)


def _suits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


def _float32(body: Any) -> bool:
    """Whether embeddings and positions come in float32, and positions for the whole of a head."""
    with torch.no_grad():
        x = body.embed_tokens(torch.zeros(1, 1, dtype=torch.int64))
        cos, _ = body.rotary_emb(x, torch.zeros(1, 1, dtype=torch.int64))
    return x.dtype == cos.dtype == torch.float32 and cos.shape[-1] == body.layers[0].self_attn.head_dim
