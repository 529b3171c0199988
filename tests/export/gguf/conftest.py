"""Tiny models with the widths that llama.cpp's blocks ask for, and a byte-level BPE tokenizer."""

import json
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bitnet.models import Size, from_scratch
from bitnet.nn import convert, freeze

TEXT = [
    "the quick brown fox jumps over the lazy dog, the dog's tail, 12345 67 89",
    "def f(x):\n    return x * 2  # twice\n\n\n\tthen some   spaces",
    "Grüße aus Köln, naïve façade; Привет мир; 你好世界 こんにちは; 🙂🙂",
] * 20
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
OTHERS = {
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 128}),
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """``tiny(body, tied=..., act=..., hidden=..., vocab=..., **config)``: a dense model with norms and biases."""

    def make(body="llama", *, tied=None, act="silu", hidden=256, wide=512, vocab=320, seed=0, **settings):
        torch.manual_seed(seed)
        shape = {
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": (body == "bitnet") if tied is None else tied,
        }
        if body in OTHERS:
            config, model, extra = OTHERS[body]
            made = model(config(vocab_size=vocab, dtype=torch.float32, **{**shape, **extra, **settings}))
        else:
            made = from_scratch(
                body=body, size=Size(**shape), vocab_size=vocab, hidden_act=act, bos_token_id=1, eos_token_id=2
            )
        for name, parameter in made.named_parameters():
            if "norm" in name:  # norms of ones and biases of zeros would hide one that gets lost
                nn.init.uniform_(parameter, 0.5, 1.5)
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        return made.eval()

    return make


@pytest.fixture(scope="session")
def b158(tiny) -> Callable[..., PreTrainedModel]:
    """The same with frozen ternary layers."""

    def make(*arguments, frozen=True, layer=None, **options):
        model = tiny(*arguments, **options)
        convert(model) if layer is None else convert(model, layer)
        if frozen:
            freeze(model)
        return model

    return make


@pytest.fixture(scope="session")
def bpe() -> Callable[..., PreTrainedTokenizerFast]:
    """``bpe(pre=..., bos=..., eos=...)``: byte-level BPE of 310 tokens, ``<s>`` 0 and ``</s>`` 1 among them."""

    def make(pre=None, *, bos=True, eos=False, ignore_merges=False, template=None):
        tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=310, special_tokens=["<s>", "</s>", "<|user|>"], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(TEXT, trainer)
        around = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(around), special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
        )
        made.chat_template = template
        return made

    return make


@pytest.fixture(scope="session")
def edited() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer whose tokenizer.json went through a function."""

    def make(tokenizer, change):
        stored = json.loads(tokenizer.backend_tokenizer.to_str())
        change(stored)
        backend = Tokenizer.from_str(json.dumps(stored))
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

    return make
