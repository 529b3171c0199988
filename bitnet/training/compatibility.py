"""What a checkpoint was made with, and whether it fits the run that loads it.

Weights of another shape or token ids of another tokenizer cannot be continued: they are refused in one line. Another
number of threads or ranks can, but sums are then taken in another order, so the bits will differ: said as a warning.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitnet.errors import InputError

FORMAT_VERSION = 1


def checkpoint_identity(tokenizer_fingerprint: str | None, world_size: int) -> dict[str, Any]:
    """The entry ``bitnet`` of a checkpoint made here and now."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer_fingerprint,
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def check_identity(checkpoint: Mapping[str, Any], expected: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Compare a loaded checkpoint with this run's identity and this model's weights.

    Raises:
        InputError: not a checkpoint of this project and format, or another tokenizer, or other shapes.
    """
    found = checkpoint.get("bitnet")
    if found is None or found["format_version"] != FORMAT_VERSION:
        version = "none" if found is None else found["format_version"]
        raise InputError(
            f"expected a training checkpoint of format {FORMAT_VERSION}, got {version}: resume from a last.ckpt or "
            "best.ckpt that this version wrote"
        )
    if None not in (found["tokenizer"], expected["tokenizer"]) and found["tokenizer"] != expected["tokenizer"]:
        raise InputError(
            f"the checkpoint was trained with tokenizer {found['tokenizer'][:12]}, this run has "
            f"{expected['tokenizer'][:12]}: use the same data and data.tokenizer settings, or start a new run"
        )
    _check_shapes(checkpoint["state_dict"], weights)
    for key, what in (("threads", "threads"), ("world_size", "processes")):
        if found[key] != expected[key]:
            warnings.warn(
                f"the checkpoint was written with {found[key]} {what}, this run has {expected[key]}: training goes on, "
                "but not bit for bit as it would have there",
                stacklevel=2,
            )


def _check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in [*expected, *(found.keys() - expected.keys())]:
        shapes = [list(weights[name].shape) if name in weights else "absent" for weights in (found, expected)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"the checkpoint is of another model: {name.removeprefix('model.')} is {shapes[0]} there and "
                f"{shapes[1]} here: resume with the model settings it was trained with, or start a new run"
            )
