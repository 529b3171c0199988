"""Models small enough to be quantized in a moment."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """Two blocks, widths that no group divides, grouped-query attention."""
    torch.manual_seed(1)
    settings = {
        "vocab_size": 60,
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    for parameter in model.parameters():  # as initialised nearly nothing would pass through the blocks
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def tiny_gpt2() -> GPT2LMHeadModel:
    """Fused qkv, Conv1D, biases, a tied head."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()
