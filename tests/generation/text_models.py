"""Tiny models of three bodies, and tokenizers whose tokens cut characters into pieces."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bitnet.models import Size, from_scratch
from bitnet.nn import convert, freeze, pack

TEXT = "Die Katze sitzt auf dem Dach, und der Hund schläft. 猫坐在屋顶上。 🙂🐈‍⬛ naïve café. " * 4
SPECIAL = ["<s>", "</s>", "<|end|>"]
BODIES = ["bitnet", "llama", "qwen2"]


def tiny(body: str = "bitnet", *, vocabulary: int = 300, context: int = 96, seed: int = 0) -> PreTrainedModel:
    """Random weights large enough for texts that do not repeat one token."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
    }
    if body == "qwen2":
        model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **shape))  # q, k, v have biases
    else:
        act = "relu2" if body == "bitnet" else "silu"
        model = from_scratch(body=body, size=Size(**shape), vocab_size=vocabulary, hidden_act=act)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "bias" in name:
            nn.init.normal_(parameter)
        elif "embed" in name or "lm_head" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def quantized(body: str = "bitnet", *, packed: bool = False, **options) -> PreTrainedModel:
    model = tiny(body, **options)
    convert(model)
    freeze(model)
    if packed:
        pack(model)
    return model


def byte_level(*, start: bool = True, end: bool = False, vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE: most tokens are one byte, so that an emoji takes four."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([TEXT], trainer)
    marks = [(each, raw.token_to_id(each)) for each in SPECIAL[:2]]
    form = f"{'<s> ' if start else ''}$A{' </s>' if end else ''}"
    raw.post_processor = processors.TemplateProcessing(single=form, special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>" if start else None, eos_token="</s>", extra_special_tokens=["<|end|>"]
    )


def byte_fallback() -> PreTrainedTokenizerFast:
    """Like SentencePiece in Llama 2: "▁" begins a word, the text's first space is dropped, bytes stand for the rest."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁cat", "s", "é", "t"]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    raw.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL[:2]])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
