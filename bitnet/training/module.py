"""The training step of a causal language model, and its validation.

What is particular here: the loss is in float32 whatever the precision of the network; learning rate and weight decay
are set from the global step right before each optimizer step, so there is no scheduler state to resume; validation sums
the negative log-likelihood of all tokens in float64 and exponentiates once.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from bitnet.errors import InputError
from bitnet.training.compatibility import check_identity, checkpoint_identity
from bitnet.training.distill import Distillation
from bitnet.training.frozen import fill_in, fingerprint, frozen_weights
from bitnet.training.schedules import Schedule

IGNORED = -100
"""The label of a token that is not predicted."""

Batch = Mapping[str, Tensor]


class LanguageModelingModule(LightningModule):
    """Train ``model`` to predict the next token.

    Args:
        model: called as ``model(input_ids=, position_ids=, use_cache=False).logits``, as transformers' causal models
            are; ``get_input_embeddings()`` gives its vocabulary.
        optimizer: makes the optimizer of the model. The learning rate and weight decay it gives to its parameter
            groups are what the schedule multiplies, after a resume too: the configuration rules, not the checkpoint.
        schedule: see `bitnet.training.schedules`.
        total_steps: optimizer steps of the whole run, ``trainer.max_steps``.
        compile: compile the network with ``torch.compile`` before the first step.
        distillation: a teacher, and what of its answers joins the loss; it is in no checkpoint.

    Attributes:
        bytes_per_token: UTF-8 bytes a validation token stands for. Set it to have bits per byte logged.
        tokenizer_fingerprint: set it to have checkpoints of another tokenizer refused.
        tokens: tokens trained on so far, over all ranks.
        step_loss: mean loss of the latest optimizer step, on the device; the cross-entropy alone with a teacher, too.
        step_terms: the same for each term of the distillation.
        tokens_per_s: training tokens a second since the last logged step, validation not counted.
        mean_tokens_per_s: the same since this process began to train; None before it has ended.

    Batches are mappings of int64 ``[batch, block]`` tensors: ``input_ids``, ``labels`` (the same ids, -100 where
    nothing is predicted; shifted by one here) and optionally ``position_ids``.

    Raises:
        InputError: the schedule does not fit into ``total_steps``; an id is outside the vocabulary; the teacher has
            another one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[nn.Module], Optimizer],
        schedule: Schedule,
        total_steps: int,
        compile: bool = False,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        schedule(0, total_steps)  # a warm-up longer than the run shows here, before any work
        if distillation is not None:
            distillation.check(model)
        self.model = model
        self.bytes_per_token: float | None = None
        self.tokenizer_fingerprint: str | None = None
        self.tokens = 0
        self.step_loss: Tensor | None = None
        self.tokens_per_s = math.nan
        self.mean_tokens_per_s: float | None = None
        self._make_optimizer = optimizer
        self._schedule = schedule
        self._total_steps = total_steps
        self._compile = compile
        self._distillation = distillation  # no module: its teacher is no part of what is trained and saved
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)  # pyright: ignore
        self._ids_checked = False
        self._losses: list[Tensor] = []  # of the micro-batches of one step
        self._terms: list[dict[str, Tensor]] = []  # the same, of the distillation
        self.step_terms: dict[str, Tensor] = {}
        self._gradient_norm: Tensor | None = None
        self._frozen: int | None = None  # fingerprint of what no checkpoint holds; they do not change
        self._window = self._start = (0, 0.0)  # (tokens, seconds) at the last logged step, and at the start
        self._pause_began = 0.0

    # Set-up

    def configure_model(self) -> None:
        """Compile in place: the network stays the same object and the names in its checkpoints stay the same."""
        if self._distillation is not None:
            self._distillation.attach(self.model)
        if self._compile:
            self.model.compile()
            self._compile = False  # Lightning calls this hook again for validation

    def configure_optimizers(self) -> Optimizer:
        optimizer = self._make_optimizer(self.model)
        self._configured = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        return optimizer

    def on_fit_start(self) -> None:
        if self._distillation is not None:
            self._distillation.share(self.model)

    def on_fit_end(self) -> None:
        if self._distillation is not None:
            self._distillation.detach()

    def on_train_start(self) -> None:
        self._window = self._start = (self.tokens, time.perf_counter())

    def on_train_end(self) -> None:
        tokens, then = self._start
        if self.tokens > tokens:
            self.mean_tokens_per_s = (self.tokens - tokens) / (time.perf_counter() - then)

    # One step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self._logits(batch)
        loss = _token_losses(logits, batch["labels"])
        # A batch without a single target teaches nothing; 0 / 0 would end the run.
        loss = loss.sum() / (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
        self._losses.append(loss.detach())
        self.tokens += batch["input_ids"].numel() * self.trainer.world_size
        self._gradient_norm = None
        self.step_loss = torch.stack(self._losses).mean()
        return loss if self._distillation is None else self._distilled(self._distillation, loss, logits, batch)

    def _distilled(self, distillation: Distillation, loss: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        """The objective: the loss and what a teacher says of the same batch."""
        terms = distillation.losses(logits, _inputs(batch), _following(batch["labels"]) != IGNORED)
        self._terms.append({name: term.detach() for name, term in terms.items()})
        self.step_terms = {name: torch.stack([each[name] for each in self._terms]).mean() for name in terms}
        return distillation.objective(loss, terms)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        factors = self._schedule(self.trainer.global_step, self._total_steps)
        for group, (lr, weight_decay) in zip(optimizer.param_groups, self._configured, strict=True):
            group["lr"] = lr * factors.lr
            group["weight_decay"] = weight_decay * factors.weight_decay
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._losses.clear()
        self._terms.clear()

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients of this step before clipping, a float32 scalar on the device; computed once a step."""
        if self._gradient_norm is None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self._gradient_norm = torch.nn.utils.get_total_norm(gradients)
        return self._gradient_norm

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        norm = self.gradient_norm()
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        stepped = not self._losses  # they were cleared by the optimizer's step
        if stepped and self.trainer.global_step % self.trainer.log_every_n_steps == 0:  # pyright: ignore
            self._log_step()

    def _log_step(self) -> None:
        now = time.perf_counter()
        tokens, then = self._window
        self.tokens_per_s = (self.tokens - tokens) / max(now - then, 1e-9)
        self._window = (self.tokens, now)
        assert self.step_loss is not None
        figures = {
            "train/loss": self.step_loss,
            "train/lr": self.learning_rate,
            "train/grad_norm": self.gradient_norm(),
            "train/tokens": float(self.tokens),
            "train/tokens_per_s": self.tokens_per_s,
            "step": float(self.trainer.global_step),  # what loggers take for the x axis: completed steps
        }
        figures |= {f"train/distill_{name}": term for name, term in self.step_terms.items()}
        self.log_dict(figures)

    @property
    def learning_rate(self) -> float:
        """Of the latest optimizer step, in the first parameter group."""
        return self.trainer.optimizers[0].param_groups[0]["lr"]

    # Validation

    def on_validation_start(self) -> None:
        self._pause_began = time.perf_counter()

    def on_validation_end(self) -> None:
        pause = time.perf_counter() - self._pause_began
        self._window, self._start = ((tokens, then + pause) for tokens, then in (self._window, self._start))

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(2, dtype=torch.float64, device=self.device)  # (nll sum, tokens): exact to 2^53

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = _token_losses(self._logits(batch), batch["labels"])
        n_tokens = (batch["labels"][:, 1:] != IGNORED).sum()
        self._validation += torch.stack([losses.double().sum(), n_tokens.double()])

    def on_validation_epoch_end(self) -> None:
        nll_sum, n_tokens = self.trainer.strategy.reduce(self._validation, reduce_op="sum")
        if n_tokens == 0:
            raise InputError("expected validation tokens to predict, got none: give more validation text")
        nll = nll_sum / n_tokens
        figures = {"val/loss": nll, "val/perplexity": nll.exp(), "step": float(self.trainer.global_step)}
        if self.bytes_per_token is not None:
            figures["val/bits_per_byte"] = nll / math.log(2) / self.bytes_per_token
        self.log_dict(figures)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["bitnet"] = checkpoint_identity(self.tokenizer_fingerprint, self.trainer.world_size)
        checkpoint["bitnet"]["tokens"] = self.tokens
        frozen = frozen_weights(self)
        if frozen:
            self._frozen = fingerprint(frozen) if self._frozen is None else self._frozen
            checkpoint["bitnet"]["frozen"] = self._frozen
            for name in frozen:
                del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fill_in(checkpoint, frozen_weights(self))
        expected = checkpoint_identity(self.tokenizer_fingerprint, self.trainer.world_size)
        check_identity(checkpoint, expected, self.state_dict())
        self.tokens = checkpoint["bitnet"]["tokens"]

    # The network

    def _logits(self, batch: Batch) -> Tensor:
        self._check_ids(batch)
        # With a cache, transformers would ignore positions that restart and let documents see each other.
        return self.model(**_inputs(batch), use_cache=False).logits

    def _check_ids(self, batch: Batch) -> None:
        """Look at every batch on a CPU, and on an accelerator, where looking waits for the device, at the first."""
        if self._ids_checked:
            return
        for key in ("input_ids", "labels"):
            ids = batch[key] if key == "input_ids" else batch[key].where(batch[key] != IGNORED, 0)
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= self._vocabulary:
                raise InputError(
                    f"{key} must be in 0 ... {self._vocabulary - 1}, the model's vocabulary, got "
                    f"{low if low < 0 else high}: give the model the tokenizer's vocabulary size, or use the tokenizer "
                    "that the tokens came from"
                )
        self._ids_checked = batch["input_ids"].device.type != "cpu"


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each next token, float32 ``[batch * block]``; 0 where it is not predicted.

    The labels are shifted, not the logits: slicing those would copy the largest tensor of the step.
    """
    following = _following(labels).flatten()
    return F.cross_entropy(logits.float().flatten(0, 1), following, ignore_index=IGNORED, reduction="none")


def _following(labels: Tensor) -> Tensor:
    """The token that each position predicts, ``[batch, block]``; `IGNORED` at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "position_ids") if key in batch}
