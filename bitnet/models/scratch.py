"""A causal language model of a given shape, with random weights, in a body that every Hugging Face runtime knows.

Two bodies:

``bitnet``   transformers' `BitNetForCausalLM`: RMSNorm before each linear group and SubLN before the two output
             projections, so every quantized linear reads a normalized input. Squared ReLU, or SiLU with
             ``hidden_act=silu`` (which is a Llama with SubLN).
``llama``    transformers' `LlamaForCausalLM`: SiLU, no SubLN.

Building either gives plain ``nn.Linear`` layers: making them 1-bit or 1.58-bit is `bitnet.convert`'s work.
"""

from dataclasses import asdict, dataclass

import torch
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bitnet.errors import InputError

BODIES = {"bitnet": (BitNetConfig, BitNetForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
ACTIVATIONS = ("relu2", "silu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The shape of a decoder, in the words of a Hugging Face config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "tie_word_embeddings" and value < 1:
                raise InputError(f"size.{name} must be positive, got {value}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise InputError(
                f"size.hidden_size must be an even multiple of num_attention_heads ({self.num_attention_heads}), "
                f"got {self.hidden_size}: rotary positions turn pairs of numbers"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"size.num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads, "
                f"got {self.num_key_value_heads}"
            )


def from_scratch(
    *,
    body: str,
    size: Size,
    vocab_size: int,
    hidden_act: str = "relu2",
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> PreTrainedModel:
    """A float32 model with weights drawn from the current torch seed; all its linears are dense.

    Raises:
        InputError: an unknown body or activation, or a shape that the body cannot have.
    """
    if body not in BODIES:
        raise InputError(f"model.body must be one of {', '.join(BODIES)}, got {body!r}")
    if hidden_act not in ACTIVATIONS:
        raise InputError(f"model.hidden_act must be one of {', '.join(ACTIVATIONS)}, got {hidden_act!r}")
    if body == "llama" and hidden_act != "silu":
        raise InputError(f"model.body=llama goes with model.hidden_act=silu, got {hidden_act!r}: runtimes assume SiLU")
    config_class, model_class = BODIES[body]
    config = config_class(
        **asdict(size),
        vocab_size=vocab_size,
        hidden_act=hidden_act,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=None,
        attention_dropout=0.0,
        dtype=torch.float32,
    )
    return model_class(config)
