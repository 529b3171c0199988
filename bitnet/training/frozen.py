"""Weights that a run does not train are not written into its checkpoints: the folder that it starts from has them.

A model with adapters (`bitnet.nn.LatentLoRA`) trains a few per cent of its numbers. A resumed run builds the model from
its folder anyway, so a checkpoint names what it left out and the CRC-32 of those bytes; where the folder holds other
weights by now, the resume is refused.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.nn.lora import lora_layers


def frozen_weights(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of ``module`` leaves out, by its names in the state dict; nothing without adapters."""
    if not lora_layers(module):
        return {}
    parameters = module.named_parameters(remove_duplicate=False)
    return {name: parameter.detach() for name, parameter in parameters if not parameter.requires_grad}


def fingerprint(weights: Mapping[str, Tensor]) -> int:
    """CRC-32 of all bytes, in the order of the names."""
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(weights[name].cpu().contiguous().view(torch.uint8).numpy().data, crc)
    return crc


def fill_in(checkpoint: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Put ``weights`` of this model where a loaded checkpoint left its own out.

    Raises:
        InputError: they are others than those it was trained with.
    """
    left_out = checkpoint.get("bitnet", {}).get("frozen")
    if left_out is None:
        return
    if left_out != fingerprint(weights):
        raise InputError(
            "the checkpoint holds adapters and no frozen weights, and those of this model are others than it was "
            "trained with: resume with the model.path and the lora settings of that run, its folder unchanged"
        )
    for name, weight in weights.items():
        checkpoint["state_dict"].setdefault(name, weight)
