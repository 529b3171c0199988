"""The model of a run: a body, from scratch or from a directory, and the layers its linears are replaced by."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitnet.errors import InputError
from bitnet.models.pretrained import from_directory
from bitnet.models.scratch import Size, from_scratch
from bitnet.models.subln import insert_subln
from bitnet.nn.convert import LayerFactory, convert

DEQUANTIZED = "bitnet_dequantized"  # entry in the config.json of a folder whose weights are codes times scales


def causal_lm(
    *,
    vocab_size: int,
    path: str | Path | None = None,
    body: str = "bitnet",
    hidden_act: str = "relu2",
    size: Size | None = None,
    layer: LayerFactory | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 0,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    subln: bool = False,
    calibration: Tensor | None = None,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Build a float32 causal language model.

    Args:
        vocab_size: rows of the embedding; a pretrained model must have at least as many.
        path: Hugging Face directory to start from; None draws random weights for ``body``, ``hidden_act`` and ``size``.
        layer: replaces every linear but the head (or but ``exclude``); None leaves the model dense.
        seed: of the random weights. The same seed gives every model of one body and size the same latent weights, so
            that a quantized model and its dense twin start equal.
        subln: put norms before the output projections of a pretrained model, see `insert_subln`.
        calibration: token ids [windows, tokens] that these norms are fitted to.
        gradient_checkpointing: in training, keep what enters each block and compute the rest again on the way back:
            the same gradients, to the bit, for less memory and one more forward pass.

    Raises:
        InputError: see `from_directory`, `from_scratch`, `insert_subln` and `bitnet.convert`.
    """
    if subln and (path is None or calibration is None):
        raise InputError(
            "model.subln=true goes into a pretrained model (model.path=DIR) and takes text to fit its norms to: from "
            "scratch, model.body=bitnet has them"
        )
    if path is not None:
        model = from_directory(path)
        if layer is not None and getattr(model.config, DEQUANTIZED, False):
            raise InputError(
                f"{path} holds weights that were quantized and written as floats: quantizing them again would shrink "
                "their scale. Evaluate it with model=hf, or train on from the run's checkpoint (resume=)"
            )
        if model.config.get_text_config().vocab_size < vocab_size:
            raise InputError(
                f"{path} has {model.config.get_text_config().vocab_size} embeddings for a tokenizer of {vocab_size} "
                f"tokens: train with the model's own tokenizer (data.tokenizer.path={path})"
            )
        if calibration is not None and subln:
            model = insert_subln(model, calibration)
    else:
        if size is None:
            raise InputError("model.size is missing: choose one with size=nano, size=125m, ... or give model.path")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = from_scratch(
                body=body,
                size=size,
                vocab_size=vocab_size,
                hidden_act=hidden_act,
                bos_token_id=bos_token_id,
                eos_token_id=eos_token_id,
            )
    if layer is not None:
        convert(model, layer, exclude=exclude)
    if gradient_checkpointing:
        _checkpoint_blocks(model)
    return model


def _checkpoint_blocks(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise InputError(
            f"{type(model).__name__} has no blocks that transformers can compute again: set "
            "model.gradient_checkpointing=false"
        )
    # transformers 5.23 gave the method another name and warns at the old one
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})  # the reentrant kind has no gradient where only weights need one
