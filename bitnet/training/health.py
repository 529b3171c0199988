"""Vital signs of quantized layers while they train.

A loss curve does not say that a layer has died: its codes all zero, or flipping to and fro; its updates too small for
the float they are added to; its int8 inputs clipped. Every so often this callback looks at each `BitLinear`, logs
``health/<layer>/<figure>`` and the mean over layers as ``health/<figure>``, and says in words, once, when a figure is
sick. It reads and never writes: the weights come out the same bits with and without it.

==================  ===============================================================================================
``zeros``           share of zero codes (ternary: 0.31 for normal weights)
``flips``           share of codes that changed since the last look
``lost_updates``    share of weights that a step with a gradient left as they were: the update was rounded away
``scale_drift``     mean scale divided by its value at the first look
``edges``           share of input codes at either end of the int8 range (1 / width is the least: each token's largest)
==================  ===============================================================================================
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from bitnet.errors import InputError
from bitnet.nn import BitLinear, bit_linears
from bitnet.quant.types import QTensor, Quantizer

HEALTHY = {
    "zeros": (0.05, 0.9),
    "flips": (0.0, 0.5),
    "lost_updates": (0.0, 0.2),
    "scale_drift": (0.1, 10.0),
    "edges": (0.0, 0.1),
}
"""Each figure's healthy range, both ends included. ``zeros`` is judged for ternary layers only."""

_ADVICE = {
    "zeros": "far more or fewer zeros than the 31 % of normal weights: check the initialization and weight decay",
    "flips": "codes flip to and fro between looks (independent codes would at 67 %): lower optim.lr",
    "lost_updates": "updates vanish in rounding: keep latent weights in float32, or raise optim.lr",
    "scale_drift": "weights have grown or shrunk tenfold since the start: check optim.weight_decay and optim.lr",
    "edges": "inputs crowd at the ends of the int8 range: check the norm before the layer and its activation range",
}

_SAMPLED_WEIGHTS = 65536  # a share of so many is known to 0.4 percentage points, and the copy stays small

Figures = dict[str, Tensor]


class HealthTelemetry(Callback):
    """Log vital signs of every BitLinear layer, and warn in words, each kind once.

    Args:
        every_n_steps: optimizer steps between two looks. A look quantizes each weight once and runs one more forward
            pass, of a single sequence.
        flips: keep a copy of all codes (one byte a weight) to count flips.
    """

    def __init__(self, every_n_steps: int = 50, flips: bool = False) -> None:
        if every_n_steps < 1:
            raise InputError(f"every_n_steps must be at least 1, got {every_n_steps}: callbacks.health=null for none")
        self._every_n_steps = every_n_steps
        self._keep_codes = flips
        self._codes: dict[str, Tensor] = {}
        self._first_scale: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}
        self._warned: set[str] = set()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % self._every_n_steps == 0:
            self._before = {name: _sample(layer.weight).clone() for name, layer in _layers(pl_module)}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._before:
            return
        edges = _edges(trainer, pl_module, batch)
        report: dict[str, dict[str, float]] = {}
        for name, layer in _layers(pl_module):
            figures = self._look(name, layer)
            if name in edges:
                figures["edges"] = edges[name]
            report[name] = {figure: float(value) for figure, value in figures.items()}
        self._before = {}
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(_flat(report), step=trainer.global_step)
            self._warn(pl_module, trainer.global_step, report)

    def state_dict(self) -> dict[str, Any]:
        return {"first_scale": self._first_scale, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first_scale, self._warned = dict(state_dict["first_scale"]), set(state_dict["warned"])

    @torch.no_grad()
    def _look(self, name: str, layer: BitLinear) -> Figures:
        q = layer.quantized_weight()
        scale = q.scale.mean()
        first = self._first_scale.setdefault(name, float(scale))
        figures = {"scale_drift": scale / first}
        if q.levels == 3:
            figures["zeros"] = (q.qdata == 0).float().mean()
        if self._keep_codes:
            if name in self._codes:
                figures["flips"] = (q.qdata != self._codes[name]).float().mean()
            self._codes[name] = q.qdata
        if layer.weight.grad is not None:
            # Where the gradient is zero the weight has nothing to lose.
            moved = _sample(layer.weight) != self._before[name]
            has_gradient = _sample(layer.weight.grad) != 0
            figures["lost_updates"] = (has_gradient & ~moved).sum() / has_gradient.sum().clamp(min=1)
        return figures

    def _warn(self, module: LightningModule, step: int, report: dict[str, dict[str, float]]) -> None:
        for figure, (low, high) in HEALTHY.items():
            values = {name: figures[figure] for name, figures in report.items() if figure in figures}
            sick = {name: value for name, value in values.items() if not low <= value <= high}
            if sick and figure not in self._warned:
                self._warned.add(figure)
                name, value = max(sick.items(), key=lambda item: abs(item[1] - (low + high) / 2))
                module.print(
                    f"Health warning at step {step}: {figure} is {value:.3g} in {name} (healthy: {low:g} to {high:g}; "
                    f"{len(sick)} of {len(values)} layers are outside). {_ADVICE[figure]}"
                )


def _layers(module: LightningModule) -> list[tuple[str, BitLinear]]:
    model: nn.Module = module.model  # pyright: ignore
    return bit_linears(model)


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLED_WEIGHTS)]


@torch.no_grad()
def _edges(trainer: Trainer, module: LightningModule, batch: Any) -> Figures:
    """Edge occupancy of each layer's input, from one extra forward pass of the batch's first sequence.

    Extra, because hooks put on a compiled network do not fire; in evaluation mode, so that it draws nothing.
    """
    shares: Figures = {}
    inputs = {key: batch[key][:1] for key in ("input_ids", "position_ids") if key in batch}

    def count(name: str, quantizer: Quantizer) -> Callable[[BitLinear, tuple[Tensor, ...]], None]:
        return lambda layer, args: shares.update({name: _edge_share(quantizer(args[0]))})

    quantizers = {name: layer.present_activation for name, layer in _layers(module)}  # None: inputs have no edges
    hooks = [
        layer.register_forward_pre_hook(count(name, quantizer))
        for name, layer in _layers(module)
        if (quantizer := quantizers[name]) is not None
    ]
    try:
        with _evaluating(module), trainer.precision_plugin.forward_context():
            module.model.forward(**inputs, use_cache=False)  # pyright: ignore
    finally:
        for hook in hooks:
            hook.remove()
    return shares


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _edge_share(q: QTensor) -> Tensor:
    return (q.qdata.int().abs() >= (q.levels - 1) // 2).float().mean()


def _flat(report: dict[str, dict[str, float]]) -> dict[str, float]:
    flat = {f"health/{name}/{figure}": value for name, row in report.items() for figure, value in row.items()}
    for figure in HEALTHY:
        values = [row[figure] for row in report.values() if figure in row]
        if values:
            flat[f"health/{figure}"] = sum(values) / len(values)
    return flat
