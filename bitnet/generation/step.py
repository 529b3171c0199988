"""One token through a decoder in as few operators as it takes.

transformers' forward pass of a 12-layer model costs 11 ms of CPU time before any weight is read (masks, views, norms of
six operators, three quantizations of one input). With packed weights that is most of a step. This module computes the
same for the bodies that it knows, on the model's own layers, and on the same cache; other bodies, and all prompts, go
through transformers.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.nn.fuse import fused

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

BODIES = ("BitNetForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"attn_sub_norm"}  # children that are needed, that may be
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "act_fn"}, {"ffn_sub_norm"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}, set[str]()
Function = Callable[[Tensor], Tensor]


class OneToken:
    """The step of one model: a token in, logits out, its keys and values appended to a cache.

    Args:
        model: of a body that `knows` knows. Packed layers that read the same input are fused (`bitnet.nn.fuse`).
        recorded: use operators only that a compiler or a CUDA graph can follow, none that waits for a number.
    """

    def __init__(self, model: "PreTrainedModel", *, recorded: bool = False) -> None:
        body: Any = model.model
        self._embed, self._rotary, self._head = body.embed_tokens, body.rotary_emb, fused([model.lm_head])
        self._norm = _norm(body.norm, recorded)
        self._layers = [_Layer(each, recorded) for each in body.layers]
        self._sign: Tensor | None = None

    def __call__(self, ids: Tensor, cache: "DynamicCache") -> Tensor:
        """Logits [1, 1, vocabulary] for ids [1, 1]."""
        return self.run(ids, torch.full_like(ids, cache.get_seq_length()), cache.layers)

    def run(self, ids: Tensor, positions: Tensor, memories: Sequence[Any], mask: Tensor | None = None) -> Tensor:
        """Logits [1, 1, vocabulary] for ids [1, 1] at positions [1, 1].

        Args:
            memories: of each layer; ``update(keys, values)`` gives all keys and values that the token may look at.
            mask: bool, [1, 1, 1, tokens]: which of these it does look at; None: all.
        """
        x = self._embed(ids)
        cos, sin = self._rotary(x, positions)
        if self._sign is None:  # half of a head's numbers are turned the other way
            self._sign = torch.cat([-torch.ones_like(sin).chunk(2, -1)[0], torch.ones_like(sin).chunk(2, -1)[0]], -1)
        sin = sin * self._sign
        for layer, memory in zip(self._layers, memories, strict=True):
            x = layer(x, cos, sin, memory, mask)
        return self._head(self._norm(x))


class _Layer:
    """Attention and feed-forward of one decoder layer for one token."""

    def __init__(self, layer: Any, recorded: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        norms = layer.input_layernorm, layer.post_attention_layernorm
        self._norm, self._norm_2 = (_norm(each, recorded) for each in norms)
        self._qkv = fused([attention.q_proj, attention.k_proj, attention.v_proj])
        self._o, self._o_norm = fused([attention.o_proj]), _norm(getattr(attention, "attn_sub_norm", None), recorded)
        self._gate_up = fused([mlp.gate_proj, mlp.up_proj])
        self._down, self._down_norm = fused([mlp.down_proj]), _norm(getattr(mlp, "ffn_sub_norm", None), recorded)
        self._activation, self._width = mlp.act_fn, mlp.gate_proj.out_features
        self._size, self._scaling = attention.head_dim, attention.scaling
        self._queries = attention.q_proj.out_features // self._size
        self._keys = attention.k_proj.out_features // self._size

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, memory: Any, mask: Tensor | None) -> Tensor:
        x = x + self._o(self._o_norm(self._attended(self._qkv(self._norm(x)), cos, sin, memory, mask)))
        both = self._gate_up(self._norm_2(x))
        inner = self._activation(both[..., : self._width]) * both[..., self._width :]
        return x + self._down(self._down_norm(inner))

    def _attended(self, qkv: Tensor, cos: Tensor, sin: Tensor, memory: Any, mask: Tensor | None) -> Tensor:
        turned = self._queries + self._keys
        heads = qkv.view(1, turned + self._keys, 1, self._size)
        turning = heads[:, :turned]
        turning = turning * cos + turning.roll(self._size // 2, -1) * sin
        keys, values = memory.update(turning[:, self._queries :], heads[:, turned:])
        queries = turning[:, : self._queries].view(1, self._keys, -1, self._size)  # those of one key side by side
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self._scaling)
        return seen.view(1, 1, -1)


def knows(model: "PreTrainedModel") -> bool:
    """Whether `OneToken` computes what ``model`` does: its body, its parts and its kind of attention are known ones."""
    if type(model).__name__ not in BODIES or model.config._attn_implementation != "sdpa":
        return False
    body: Any = model.model
    return all(
        _has(layer, LAYER) and _has(layer.self_attn, ATTENTION) and _has(layer.mlp, FEED_FORWARD)
        for layer in body.layers
    ) and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _has(module: nn.Module, children: tuple[set[str], set[str]]) -> bool:
    needed, possible = children
    found = {name for name, _ in module.named_children()}
    return needed <= found <= needed | possible


def _norm(module: Any, recorded: bool) -> Function:
    if module is None:
        return lambda x: x
    if recorded:
        return module
    weight, eps = module.weight, module.variance_epsilon

    def norm(x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
            return module(x)
        flat = x.float().view(-1)  # three operators; the module's are six, rms_norm's a dozen
        mean = torch.dot(flat, flat).item() / len(flat) + eps
        scaled = flat * (mean**-0.5 if mean else torch.inf)
        return (scaled.to(x.dtype) * weight).view(x.shape)  # rounded where the module rounds

    return norm
