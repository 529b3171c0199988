"""AdamW with the decay groups of language models.

Weight decay shrinks what multiplies activations, so it belongs on the matrices of linear layers alone. Norm gains and
biases set a scale or an offset that nothing downstream undoes, and an embedding row is only touched when its token
occurs: decay would pull rare tokens to zero.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from bitnet.errors import InputError


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW in two groups: weights of linear layers decay; norms, biases and embeddings do not.

    A head that shares its matrix with the embedding counts as an embedding. The kernel is the fused one: one pass over
    memory instead of a dozen (36 ms against 167 ms for 21M parameters on one AVX2 core).

    Raises:
        InputError: a trainable parameter is in half precision, nothing is trainable, or ``lr`` is no positive number.

    Source: Decoupled weight decay, arXiv:1711.05101; betas of BitNet b1.58, arXiv:2402.17764.
    """
    if not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise InputError(f"optim.lr must be a positive number, got {lr!r}")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise InputError("expected a model with trainable parameters, got none: unfreeze some layers")
    for name, parameter in trainable.items():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise InputError(
                f"trainable weights must be float32, got {parameter.dtype} in {name}: half precision rounds most "
                "updates away (69.5 % of them at lr 2e-5, sigma 0.02): keep the model in float32 and set "
                "trainer.precision=bf16-mixed for speed"
            )
    decaying = _linear_weights(model)
    groups = [
        {"params": [p for p in trainable.values() if id(p) in decaying], "weight_decay": weight_decay},
        {"params": [p for p in trainable.values() if id(p) not in decaying], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True
    )


def _linear_weights(model: nn.Module) -> set[int]:
    def identities(kind: type[nn.Module]) -> Iterable[int]:
        return (id(module.weight) for module in model.modules() if isinstance(module, kind))

    return set(identities(nn.Linear)) - set(identities(nn.Embedding))
