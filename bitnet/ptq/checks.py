"""What cannot be quantized is refused, or said aloud, before any work."""

import warnings

import torch
import torch.distributed
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.nn.convert import refuse_shared_weights
from bitnet.ptq.blocks import linears_of
from bitnet.ptq.protocol import PTQMethod
from bitnet.ptq.statistics import Activation, in_parallel
from bitnet.quant import Rotated, RotatedInputs


def refuse_tied(model: nn.Module, name: str, option: str) -> None:
    """Raise InputError where the weight of ``name``, which ``option`` wants quantized, is another module's too."""
    try:
        refuse_shared_weights(model, [name])
    except InputError:
        raise InputError(
            f"{option}: the model's input embedding and its head are one parameter: leave {option} out"
        ) from None


def one_activation(method: PTQMethod, activation: Activation) -> Activation:
    """What quantizes the inputs: the method's own, or the one that was asked for.

    Raises:
        InputError: both are there, or the method is a class.
    """
    if isinstance(method, type):
        raise InputError(f"method must be made first: {method.__name__}(), not {method.__name__}")
    if isinstance(activation, Rotated | RotatedInputs):
        raise InputError(
            "inputs are turned together with the weights, when a model is converted for training: choose "
            "model=bitnet158 with activation=a4_rotated, or activation=a4 here"
        )
    own = getattr(method, "activation", None)
    if own is not None and activation is not None:
        raise InputError(
            f"{type(method).__name__} quantizes the activations itself, and a second quantizer for them was given: "
            "leave out activation=, or choose a method for weights alone"
        )
    return own if activation is None else activation


def checked_text(calibration: Tensor | None, needs: list[str]) -> Tensor | None:
    """``calibration`` as int64; ``needs`` names what cannot be done without it.

    Raises:
        InputError: it is missing, or no token ids [windows, window].
    """
    if calibration is None:
        if needs:
            raise InputError(f"{' and '.join(needs)} need calibration text: give token ids [windows, window]")
        return None
    if not isinstance(calibration, Tensor):
        raise InputError(
            f"calibration must be a tensor of token ids [windows, window], got {type(calibration).__name__}"
        )
    whole = not (calibration.is_floating_point() or calibration.is_complex() or calibration.dtype == torch.bool)
    if calibration.dim() != 2 or not whole or not calibration.numel():
        raise InputError(
            f"calibration must be token ids, integers [windows, window], got {calibration.dtype} "
            f"{list(calibration.shape)}"
        )
    return calibration.long()


def own_share(calibration: Tensor | None) -> Tensor | None:
    """Of several processes each runs every so many windows; the statistics are reduced."""
    if calibration is None or not in_parallel():
        return calibration
    return calibration[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def warn_of_the_rest(prefix: str, blocks: list[nn.Module]) -> None:
    """Say which matrices of the blocks are in no linear layer (experts in one tensor, for most): they stay."""
    rest: dict[str, int] = {}
    total = 0
    for index, block in enumerate(blocks):
        linears = {f"{name}.weight" for name in linears_of(block)}
        for name, parameter in block.named_parameters():
            total += parameter.numel()
            if parameter.dim() >= 2 and name not in linears:
                rest[f"{prefix}.{index}.{name}"] = parameter.numel()
    if rest:
        warnings.warn(
            f"{sum(rest.values()) / total:.0%} of the weights in the blocks are in no linear layer and stay as they "
            f"are: {next(iter(rest))} and {len(rest) - 1} more",
            stacklevel=4,
        )
