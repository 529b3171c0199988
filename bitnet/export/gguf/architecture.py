"""Which model bodies GGUF runtimes can compute, under which names they know their tensors, and their settings.

=============  ======================================  =====================================================
architecture   transformers                            particular
=============  ======================================  =====================================================
llama          LlamaForCausalLM, MistralForCausalLM    the rows of q and k are permuted (below)
bitnet         BitNetForCausalLM with SiLU             SubLN; the head is the embedding; no biases
bitnet-b1.58   BitNetForCausalLM with squared ReLU     the same; bitnet.cpp only, so with I2_S only
qwen2          Qwen2ForCausalLM                        biases in q, k and v
qwen3          Qwen3ForCausalLM                        norms over the heads of q and k
=============  ======================================  =====================================================

llama.cpp's ``llama`` turns neighbouring rows of a head by one angle, transformers row i and row i + half: the rows of q
and k (of weights, bytes of blocks and biases alike) are interleaved, and put back when read. A squared-ReLU model
under the name ``bitnet`` would load in llama.cpp, which has SiLU there, and be wrong: it is refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export.gguf.container import Container, Value
from bitnet.export.parity import rotary_problems
from bitnet.quant import LearnedScale

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
SUB_NORMS = {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of the rows above.

    Attributes:
        name: ``general.architecture``.
        model_type: transformers' name.
        norms: of a layer, by their name in transformers.
        biases: linears of a layer whose bias is read.
        permuted: whether rows of q and k are interleaved.
        tied: whether the head must be the embedding.
        square: whether heads times their size must be the hidden size.
        activation: ``hidden_act``.
        unscaled: parts of names whose ``.scale`` llama.cpp does not multiply by (in 2026; it loads them and is wrong).
    """

    name: str
    model_type: str
    norms: dict[str, str]
    biases: tuple[str, ...] = ()
    permuted: bool = False
    tied: bool = False
    square: bool = False
    activation: str = "silu"
    unscaled: tuple[str, ...] = ()

    def gguf_name(self, name: str) -> str | None:
        """GGUF's name of the tensor or module that transformers calls ``name``; None where it has no place."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?", name)
        if match is None:
            stem, dot, last = name.rpartition(".")
            if last not in ("weight", "bias"):
                stem, dot, last = name, "", ""
            return OUTER[stem] + dot + last if stem in OUTER and last != "bias" else None
        layer, stem, last = match.groups()
        if last == ".bias" and stem not in self.biases:
            return None
        known = {**LINEARS, **self.norms}
        return f"blk.{layer}.{known[stem]}{last or ''}" if stem in known else None

    def scale_problem(self, name: str, biased: bool) -> str | None:
        """Why the scale of the linear ``name`` must not lie beside its codes, None where it may."""
        if any(part in name for part in self.unscaled):
            return (
                f"llama.cpp ignores the tensors .scale of these layers in the architecture {self.name}: set scale=block"
            )
        if biased and ".mlp." in name:  # after the bias there, before it in attention
            return "llama.cpp multiplies the biases of these layers by their .scale, too: set scale=block"
        return None

    def heads(self, name: str, config: Any) -> int | None:
        """The number of heads whose rows are interleaved in the tensor or module ``name``, None where they are not."""
        if not self.permuted:
            return None
        if ".q_proj" in name:
            return config.num_attention_heads
        return config.num_key_value_heads if ".k_proj" in name else None


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("llama", "llama", NORMS, tuple(LINEARS), permuted=True),
        Architecture("bitnet", "bitnet", NORMS | SUB_NORMS, tied=True, square=True),
        Architecture("bitnet-b1.58", "bitnet", NORMS | SUB_NORMS, tied=True, square=True, activation="relu2"),
        Architecture("qwen2", "qwen2", NORMS, QKV, square=True, unscaled=(".mlp.",)),
        Architecture("qwen3", "qwen3", NORMS | HEAD_NORMS, QKV),
    )
}
BODIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "BitNetForCausalLM": "bitnet",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
EPSILON = "attention.layer_norm_rms_epsilon"
SMALLEST_EPSILON = 1e-30  # usual are 1e-6 and 1e-5; float32 ends at 1e-38
KNOWN_KEYS = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    EPSILON,
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "vocab_size",
}


def architecture_of(model: nn.Module, type: str) -> Architecture:
    """The architecture for a model and a tensor type.

    Raises:
        InputError: GGUF runtimes have none for this body.
    """
    name = BODIES.get(model.__class__.__name__)
    if name is None:
        raise InputError(
            f"no architecture of llama.cpp is known here for {model.__class__.__name__}: {', '.join(BODIES)}"
        )
    config: Any = model.config
    if name == "bitnet" and type == "I2_S" and config.hidden_act == "relu2":
        name = "bitnet-b1.58"
    return ARCHITECTURES[name]


def body_problems(architecture: Architecture, model: nn.Module) -> Iterator[str]:
    """What of a model's settings and tensors the architecture does not compute."""
    config: Any = model.config
    if config.hidden_act != architecture.activation:
        hint = (
            "train with model.hidden_act=silu, or type=I2_S for bitnet.cpp"
            if architecture.name == "bitnet" and config.hidden_act == "relu2"
            else f"train with model.hidden_act={architecture.activation}"
        )
        yield (
            f"the architecture {architecture.name} computes {architecture.activation}, the model {config.hidden_act}: "
            f"it would load and be wrong; {hint}"
        )
    if architecture.tied and not config.tie_word_embeddings:
        yield (
            f"the architecture {architecture.name} takes the embedding for the head, this model has its own: train "
            "with size.tie_word_embeddings=true"
        )
    rope = getattr(config, "rope_parameters", None) or {"rope_type": "default"}
    if rope.get("rope_type", "default") not in ("default", "linear"):
        yield f"rotary positions of the type {rope['rope_type']!r} are not written: only default and linear are"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        yield f"attention in a sliding window of {config.sliding_window} is not written: set config.sliding_window=None"
    if architecture.square and _head_size(config) * config.num_attention_heads != config.hidden_size:
        yield f"heads of {_head_size(config)} do not add up to the hidden size, as {architecture.name} expects"
    yield from rotary_problems(model)
    learned = {f"{name}.scale" for name, module in model.named_modules() if isinstance(module, LearnedScale)}
    lost = [name for name in model.state_dict() if name not in learned and not architecture.gguf_name(_parameter(name))]
    for what, is_bias in (("biases there", True), ("such a tensor", False)):
        if names := [name for name in lost if name.endswith(".bias") is is_bias]:
            yield f"{names[0]} has no place ({len(names)} in all): the architecture {architecture.name} has no {what}"
    if config.tie_word_embeddings and not _is_tied(model):
        yield "the config ties head and embedding, and they are two tensors: set config.tie_word_embeddings=False"


def _parameter(name: str) -> str:
    """The parameter that a buffer of a quantized layer stands for."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.weight" if last == "qdata" or last.startswith("weight_") else name


def _is_tied(model: nn.Module) -> bool:
    get: Any = model
    return get.get_output_embeddings().weight is get.get_input_embeddings().weight


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def settings(architecture: Architecture, config: Any) -> dict[str, Value]:
    """The key-value pairs that describe the body."""
    rope = getattr(config, "rope_parameters", None) or {}
    size = _head_size(config)
    counts = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        "vocab_size": config.vocab_size,
    }
    pairs = {f"{architecture.name}.{key}": Value("u32", count) for key, count in counts.items()}
    pairs[f"{architecture.name}.{EPSILON}"] = Value("f32", config.rms_norm_eps)
    pairs[f"{architecture.name}.rope.freq_base"] = Value("f32", rope.get("rope_theta", 10000.0))
    if rope.get("rope_type", "default") == "linear":
        pairs[f"{architecture.name}.rope.scaling.type"] = Value("str", "linear")
        pairs[f"{architecture.name}.rope.scaling.factor"] = Value("f32", rope["factor"])
    return pairs


def read_config(file: Container) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a file and transformers' config for it, as a dict.

    Raises:
        InputError: an unknown architecture, settings that this package does not compute, or that no tensor bears out.
    """
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        raise InputError(f"{file.path} is of the architecture {name!r}: read are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    prefix = f"{name}."
    if unknown := sorted(key for key in file.pairs if key.startswith(prefix) and key[len(prefix) :] not in KNOWN_KEYS):
        raise InputError(f"{file.path} has the setting {unknown[0]}, which is not computed here")
    layers = file.integer(prefix + "block_count")
    if not 1 <= layers <= len(file.tensors):
        raise InputError(f"{file.path} announces {layers} blocks, and holds {len(file.tensors)} tensors")
    if architecture.tied and "output.weight" in file.tensors:
        raise InputError(f"{file.path} holds output.weight, and {name} takes the embedding for the head")
    shapes = _shapes(file)
    heads = file.integer(prefix + "attention.head_count")
    groups = file.integer(prefix + "attention.head_count_kv", heads)
    vocabulary, hidden = shapes["token_embd.weight"]
    if not (heads and groups and heads % groups == 0 and shapes["blk.0.attn_q.weight"][0] % heads == 0):
        raise InputError(f"{file.path}: {heads} heads and {groups} key-value heads fit no blk.0.attn_q.weight")
    size = shapes["blk.0.attn_q.weight"][0] // heads
    for key, count in (
        ("embedding_length", hidden),
        ("feed_forward_length", shapes["blk.0.ffn_up.weight"][0]),
        ("vocab_size", vocabulary),
        ("attention.key_length", size),
        ("attention.value_length", size),
        ("rope.dimension_count", size),
    ):
        if file.integer(prefix + key, count) != count:
            raise InputError(f"{file.path}: {prefix}{key} is {file.pairs[prefix + key]}, and its tensors say {count}")
    config = {
        "model_type": architecture.model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["blk.0.ffn_up.weight"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": size,
        "hidden_act": architecture.activation,
        "max_position_embeddings": _within(file, key := prefix + "context_length", file.integer(key), 1, 2**32),
        "rms_norm_eps": _within(file, key := prefix + EPSILON, _as_written(file.number(key)), SMALLEST_EPSILON, 1),
        "rope_parameters": _rope(file, prefix),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_marks(file, vocabulary),
        **_biased(architecture, file),
    }
    return architecture, config


def _biased(architecture: Architecture, file: Container) -> dict[str, bool]:
    extra = {"use_sliding_window": False} if architecture.model_type.startswith("qwen") else {}
    if architecture.model_type in ("llama", "qwen3"):
        extra["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture.model_type == "llama":
        extra["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return extra


def _shapes(file: Container) -> dict[str, tuple[int, ...]]:
    shapes = {name: entry.shape for name, entry in file.tensors.items()}
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_up.weight"):
        if len(shapes.get(name, ())) != 2:
            raise InputError(f"{file.path} lacks the matrix {name}: truncated, or of another architecture?")
    return shapes


def _within(file: Container, key: str, value: float, low: float, high: float) -> Any:
    if not low <= value < high:
        raise InputError(f"{file.path}: {key} must lie between {low} and {high}, got {value}: the file is damaged")
    return value


def _rope(file: Container, prefix: str) -> dict[str, Any]:
    base = _as_written(file.number(key := prefix + "rope.freq_base", 1e4))
    base = _within(file, key, base, 1, float("inf"))  # usual are 1e4 to 1e7; near 0 the angles overflow
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    factor = _as_written(file.number(prefix + "rope.scaling.factor", 1.0))
    kind = file.text(prefix + "rope.scaling.type", "linear")
    if kind not in ("none", "linear") or factor <= 0:
        raise InputError(f"{file.path}: rotary positions scaled by {kind!r} are not computed here")
    return rope | {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1.0 else rope


def _marks(file: Container, vocabulary: int) -> dict[str, int | None]:
    marks = dict[str, int | None]()
    for ours, theirs in {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        marks[ours] = file.integer(key) if key in file.pairs else None
        if (marks[ours] or 0) >= vocabulary:
            raise InputError(f"{file.path}: {key} is {marks[ours]}, and the model has {vocabulary} tokens")
    return marks


def _as_written(number: float) -> float:
    """A float32 as the shortest decimal that rounds to it: 1e-5 and not 9.99999974e-06."""
    return float(str(torch.tensor(number, dtype=torch.float32).numpy()))


def interleave(rows: Tensor, heads: int | None) -> Tensor:
    """Rows of q or k (weights, bytes, biases: [rows, ...]) in llama.cpp's order; unchanged where ``heads`` is None."""
    return rows if heads is None else rows[_order(len(rows), heads)]


def deinterleave(rows: Tensor, heads: int | None) -> Tensor:
    """The reverse of `interleave`."""
    return rows if heads is None else rows[torch.argsort(_order(len(rows), heads))]


def _order(rows: int, heads: int) -> Tensor:
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)
