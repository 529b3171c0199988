"""SubLN for a pretrained model: an RMSNorm before each output projection, fitted so that the model answers as before.

A 1.58-bit layer wants inputs of one size. BitNet's blocks have two norms more than a Llama's: ``attn_sub_norm`` before
``o_proj`` and ``ffn_sub_norm`` before ``down_proj``. Putting them into a trained model takes one thing away for good,
the size that each token's vector had among others; what all tokens share, the norm's gains can give back. They are the
least squares, channel by channel over the dense model's inputs ``x`` of these layers, of

    x[j]  ~=  gain[j] * x[j] / rms(x)

The result is transformers' `BitNetForCausalLM` with ``hidden_act=silu``, which every export knows. How near it is, on
the reference model (6.8M parameters, loss 3.711), fitted on 4,096 tokens and measured on 8,192 others:

    gains                                       loss      KL to the dense model, nats
    1                                           +1.061    1.011
    one number a norm, the mean rms             +0.317    0.320
    one a channel (this module)                 +0.232    0.224
    one a channel, fitted norm after norm       +0.239    0.230
    one a channel, error behind the projection  +0.240    0.225
    this, and the projections refitted          +0.190    0.187

What is left comes from the sizes of the vectors (standard deviation between tokens: 26 to 65 % of the mean in the six
feed-forwards, 12 to 22 % in attention), which no fixed gain can restore: training has to. Fitting more did not pay.

Source: SubLN in BitNet, arXiv:2310.11453; for pretrained models BitDistill, arXiv:2510.13998. The fit is ours.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitNetConfig, BitNetForCausalLM, PreTrainedModel

from bitnet.errors import InputError
from bitnet.models.empty import empty_causal_lm

BODIES = ("llama", "mistral", "qwen2")  # blocks that differ from BitNet's in the two norms alone
KEPT = (  # what both configs mean alike
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)
SUB_NORMS = {"self_attn.o_proj": "self_attn.attn_sub_norm", "mlp.down_proj": "mlp.ffn_sub_norm"}


@torch.no_grad()
def insert_subln(model: PreTrainedModel, token_ids: Tensor) -> BitNetForCausalLM:
    """The same model with SubLN, its parameters those of ``model`` (shared, not copied), in float32.

    Args:
        model: a dense `LlamaForCausalLM`, or a Mistral or Qwen2 without sliding window, with SiLU.
        token_ids: int64 [windows, tokens] of text like that of the training; some thousand tokens suffice.

    Raises:
        InputError: another body, quantized layers, or a config that BitNet's has no word for.
    """
    _refuse_other(model)
    made = cast(BitNetForCausalLM, empty_causal_lm({**_config(model).to_dict(), "model_type": "bitnet"}))
    _share(model, made)
    _fit(model, made, token_ids.to(model.device))
    return made.to(model.device).train(model.training)  # pyright: ignore  # transformers wraps it without types


def sub_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of SubLN in a BitNet body, by name."""
    ends = tuple(SUB_NORMS.values())
    return {name: module for name, module in model.named_modules() if name.endswith(ends)}


def _fit(model: PreTrainedModel, made: BitNetForCausalLM, token_ids: Tensor) -> None:
    """Set the gains of all sub-norms from forward passes of the dense model; sums are in float64."""
    norms = sub_norms(made)
    sums = {norm: torch.zeros(2, module.weight.numel(), dtype=torch.float64) for norm, module in norms.items()}  # pyright: ignore
    linears = dict(model.named_modules())
    eps: float = model.config.rms_norm_eps

    def note(norm: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, 1).double()
            read = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            sums[norm] += torch.stack([(x * read).sum(0), read.square().sum(0)]).cpu()

        return hook

    handles = [linears[_reader(norm)].register_forward_pre_hook(note(norm)) for norm in norms]
    training = model.training
    try:
        model.eval()
        for window in token_ids:
            model(input_ids=window[None], use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for norm, module in norms.items():
        products, squares = sums[norm]
        # A channel that is 0 in every token has no best gain: it stays silent with any.
        gains = torch.where(squares > 0, products / squares.clamp(min=1e-300), 1.0)
        module.weight.copy_(gains)  # pyright: ignore


def _reader(norm: str) -> str:
    """The name of the linear that reads a norm."""
    return next(norm.removesuffix(end) + linear for linear, end in SUB_NORMS.items() if norm.endswith(end))


def _share(model: PreTrainedModel, made: BitNetForCausalLM) -> None:
    """Give ``made`` the parameters of ``model``. Qwen2's output projection has no bias where BitNet's has: it is 0."""
    norms = sub_norms(made)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in list(made.named_parameters(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        if name in theirs:
            made.get_submodule(owner).register_parameter(attribute, theirs.pop(name))
        else:
            assert attribute == "bias" or owner in norms, name
            fill = torch.ones if owner in norms else torch.zeros
            values = fill(parameter.shape, device=model.device, dtype=model.dtype)
            made.get_submodule(owner).register_parameter(attribute, nn.Parameter(values))
    assert not theirs, sorted(theirs)
    made.generation_config = model.generation_config


def _config(model: PreTrainedModel) -> BitNetConfig:
    config: Any = model.config
    kept = {key: getattr(config, key) for key in KEPT}
    return BitNetConfig(**kept, attention_bias=_has_bias(model), dtype=model.dtype)


def _has_bias(model: PreTrainedModel) -> bool:
    return any(name.endswith("q_proj.bias") for name, _ in model.named_parameters())


def _refuse_other(model: PreTrainedModel) -> None:
    config: Any = model.config
    kind = config.model_type
    if kind not in BODIES:
        raise InputError(
            f"SubLN goes into the bodies {', '.join(BODIES)}, whose blocks are BitNet's but for it; got {kind}: "
            "train it without (model.subln=false)"
        )
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    reasons = {
        "a quantized layer: insert SubLN before the conversion": any(type(each) is not nn.Linear for each in linears),
        f"hidden_act={config.hidden_act!r}: only silu is known to every runtime": config.hidden_act != "silu",
        "biases in its feed-forward": bool(getattr(config, "mlp_bias", False)),
        "attention in a sliding window": _slides(config),
        "heads that are not as wide as the model together": (getattr(config, "head_dim", None) or 0)
        not in (0, config.hidden_size // config.num_attention_heads),
    }
    for reason, found in reasons.items():
        if found:
            raise InputError(f"SubLN cannot go into this {kind} model, which has {reason}: leave out model.subln")


def _slides(config: Any) -> bool:
    window = getattr(config, "sliding_window", None)
    return (
        window is not None and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings
    )
