"""How well a causal language model predicts a text: the mean negative log-likelihood of a token, in nats.

The sum is kept in float64 and exponentiated once, at the end. The other order (softmax, logarithm, mean of per-batch
perplexities) turns one token of probability near zero into an infinite perplexity, and weights short batches like long
ones.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bitnet.errors import InputError

IGNORED = -100  # the label of a token that is not predicted
MODEL_INPUTS = ("input_ids", "position_ids")


@dataclass(frozen=True, slots=True)
class LossSummary:
    """The summed negative log-likelihood of ``n_tokens`` predicted tokens, in nats.

    ``n_bytes`` is the length in UTF-8 bytes of the text that those tokens spell, estimated from the mean bytes a token
    of the whole split; None where that is not known.
    """

    nll_sum: float
    n_tokens: int
    n_bytes: float | None = None

    @property
    def nll(self) -> float:
        """Nats per token."""
        return self.nll_sum / self.n_tokens

    @property
    def perplexity(self) -> float:
        """``exp(nll)``; infinite above 709 nats per token, where float64 ends."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte: the figure to compare models of different tokenizers by. None without ``n_bytes``."""
        return None if self.n_bytes is None else self.nll_sum / math.log(2) / self.n_bytes


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and each back in the mode it had (a part may be frozen on purpose)."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _batch_loss(model: nn.Module, batch: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return [nll_sum, n_tokens] of one batch, float64, on the model's device (no host synchronisation)."""
    inputs = {name: batch[name].to(device) for name in MODEL_INPUTS if name in batch}
    labels = batch["labels"].to(device)[:, 1:].flatten()
    # With its cache on, a model of transformers ignores positions that restart, and documents see each other.
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    # cross_entropy is a log-softmax and a look-up: finite for every finite logit, whatever its probability.
    nll = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    return torch.stack([nll.double().sum(), (labels != IGNORED).sum().double()])


def evaluate_loss(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    bytes_per_token: float | None = None,
) -> LossSummary:
    """Return the loss of ``model`` on ``batches``: log-softmax in float32, summed in float64.

    Args:
        model: A causal language model, called as ``model(input_ids=..., use_cache=False).logits``. Its gradients and
            its training mode are as before afterwards.
        batches: Dicts of ``input_ids`` and ``labels``, int64 [batch, time], and ``position_ids`` where positions
            restart. ``labels[:, t]`` is predicted from position t - 1 (shifted here); -100 is not predicted.
        device: Where to compute; by default where the model's first parameter lies.
        max_batches: Stop after so many batches.
        bytes_per_token: UTF-8 bytes of the text per token, for bits per byte.

    Raises:
        InputError: No batch holds a token to predict, or a loss is NaN or infinite.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad(), evaluating(model):
        for batch in islice(batches, max_batches):
            total += _batch_loss(model, batch, device)
    nll_sum, n_tokens = total.tolist()
    if n_tokens == 0:
        raise InputError("expected at least one token to predict, got none: give longer or more batches to evaluate")
    if not math.isfinite(nll_sum):
        raise InputError(f"the model's loss on this text is {nll_sum}: its weights or logits hold NaN or infinity")
    n_bytes = None if bytes_per_token is None else n_tokens * bytes_per_token
    return LossSummary(nll_sum, int(n_tokens), n_bytes)
