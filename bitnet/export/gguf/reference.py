"""What llama.cpp computes, in float64: the same model, with inputs quantized in llama.cpp's blocks.

llama.cpp on a CPU rounds the inputs of a matrix product to what goes with the type of the matrix:

    TQ1_0 TQ2_0 Q2_K ... Q6_K    Q8_K   blocks of 256, scale -max/127 with the sign of the largest magnitude, float32
    Q1_0 Q2_0 Q4_0 Q8_0          Q8_0   blocks of 32, scale max/127; codes for its float32, values with its float16
    F16, BF16                    F16, BF16
    F32                          not at all

Everything else (norms, rotary positions, attention, sums) is in float64 here and in float32 there. The float32 side now
and then rounds an input next to a boundary to the neighbouring code; such a flip is passed on by all later layers, and
makes 1e-3 to 1e-2 of the logits' spread where all else agrees to 1e-7. So the logits of a short text on a small model
agree to 1e-6, and those of a longer one do for the positions before the first flip.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitnet.export.gguf.reader import GGUFFile, MappedLinear, build
from bitnet.export.gguf.types import DENSE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def in_float64(file: GGUFFile) -> "PreTrainedModel":
    """The model of a file with linears, norms, embedding and rotary positions as said above; its codes stay mapped."""
    model = build(file, torch.float32, mapped=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, MappedLinear):
            model.set_submodule(name, _Linear(module, _BLOCKS.get(file.type_of(name), q8_k)))
        elif isinstance(module, nn.Linear):
            model.set_submodule(name, _DenseLinear(module, DENSE[file.type_of(name)]))
        elif type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, _Norm(module))
        elif type(module).__name__.endswith("RotaryEmbedding"):
            model.set_submodule(name, _Rotary(module))
        elif name == "model.embed_tokens":
            model.set_submodule(name, _Embedding(module))
    model.set_attn_implementation("sdpa")
    return model


def q8_k(x: Tensor) -> Tensor:
    """float32 inputs as llama.cpp's Q8_K holds them, in float64."""
    blocks = x.float().unflatten(-1, (-1, 256))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest == 0, 0.0, torch.full_like(largest, -127.0) / largest)
    codes = (blocks * inverse).round().clamp(max=127)
    step = torch.where(largest == 0, 0.0, 1 / inverse)
    return (codes.double() * step.double()).flatten(-2)


def q8_0(x: Tensor) -> Tensor:
    """float32 inputs as llama.cpp's Q8_0 holds them, in float64."""
    blocks = x.float().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest == 0, 0.0, torch.full_like(largest, 127.0) / largest)
    step = (largest / torch.full_like(largest, 127.0)).half()
    return ((blocks * inverse).round().double() * step.double()).flatten(-2)


_BLOCKS = {"Q1_0": q8_0, "Q2_0": q8_0, "Q4_0": q8_0, "Q8_0": q8_0}


class _Linear(nn.Module):
    def __init__(self, mapped: MappedLinear, quantize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mapped, self.quantize = mapped, quantize

    def forward(self, input: Tensor) -> Tensor:
        weight = self.mapped.file.weight(self.mapped.name)
        assert not isinstance(weight, Tensor)
        bias = None if self.mapped.bias is None else self.mapped.bias.double()
        return nn.functional.linear(self.quantize(input), weight.dequantize().double(), bias)


class _DenseLinear(nn.Module):
    def __init__(self, linear: nn.Linear, stored: torch.dtype) -> None:
        super().__init__()
        self.linear, self.stored = linear, stored

    def forward(self, input: Tensor) -> Tensor:
        if self.stored is not torch.float32:
            input = input.float().to(self.stored)
        bias = None if self.linear.bias is None else self.linear.bias.double()
        return nn.functional.linear(input.double(), self.linear.weight.double(), bias)


class _Norm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        held: Any = norm
        self.weight, self.epsilon = held.weight, held.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight.double()


class _Embedding(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids).double()


class _Rotary(nn.Module):
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        held: Any = rotary
        rope = held.config.rope_parameters
        size = getattr(held.config, "head_dim", None) or held.config.hidden_size // held.config.num_attention_heads
        steps = torch.arange(0, size, 2, dtype=torch.float64) / size
        self.frequencies = rope["rope_theta"] ** -steps / rope.get("factor", 1.0)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()
