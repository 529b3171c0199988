"""Takes a method through a model: block by block, each calibrated on what the already quantized blocks give it.

For every block, stage by stage (the linears that share an input are one stage: q, k, v; o; gate, up; down):

1. run the calibration text through the block as far as the stage, and collect the statistics of its input;
2. quantize the stage's layers with them, and put the result in their place.

Then the block's outputs become the next block's inputs. At any time the memory holds the model, the inputs of one
block (in files beyond a budget), and the statistics of one stage: one Hessian.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.nn import QuantizedEmbedding, QuantizedLinear
from bitnet.nn.convert import matching, refuse_shared_weights
from bitnet.nn.linears import weight_of
from bitnet.ptq.blocks import embedding_of, find_blocks, head_of, linears_of, sharing_an_input, until_reached, watched
from bitnet.ptq.checks import checked_text, one_activation, own_share, refuse_tied, warn_of_the_rest
from bitnet.ptq.flow import Flow
from bitnet.ptq.hessian import relative_error
from bitnet.ptq.journal import Journal
from bitnet.ptq.progress import Progress, Silent
from bitnet.ptq.protocol import LayerStats, PTQMethod, Statistic
from bitnet.ptq.settings import Driver, LayerResult
from bitnet.ptq.smoothquant import smooth_block_
from bitnet.ptq.statistics import Activation, StageInputs, in_parallel
from bitnet.quant import QuantizedWeight
from bitnet.quant.static import StaticActivation


def quantize(
    model: nn.Module,
    method: PTQMethod,
    calibration: Int64[Tensor, "windows window"] | None = None,
    *,
    activation: Activation = None,
    driver: Driver | None = None,
    directory: str | Path | None = None,
    progress: Progress | None = None,
) -> list[LayerResult]:
    """Quantize the linear layers in the blocks of ``model``, in place, and return what became of each.

    Args:
        model: a causal language model (transformers or alike, called as ``model(input_ids, use_cache=False)``).
        method: `RoundToNearest`, `GPTQ`, `KQuant`, ...
        calibration: token ids, windows of one length; None for a method that needs none.
        activation: quantizes the inputs of the quantized layers, too; a `StaticActivation` is calibrated here.
        driver: options.
        directory: keeps each finished block, so that a call with the same arguments goes on where one was killed and
            ends with the same result; None keeps nothing.
        progress: is told of every layer and block.

    Raises:
        InputError: the model, the text or the options cannot be used, or ``directory`` belongs to other ones. The model
            may then be quantized in part.
    """
    work = _Work(model, method, calibration, activation, driver or Driver(), progress or Silent())
    return work.run(None if directory is None else Path(directory))


class _Work:
    """One call of `quantize`: its arguments, and the results so far."""

    def __init__(
        self,
        model: nn.Module,
        method: PTQMethod,
        calibration: Tensor | None,
        activation: Activation,
        options: Driver,
        progress: Progress,
    ) -> None:
        self.model, self.method, self.options, self.progress = model, method, options, progress
        self.activation = one_activation(method, activation)
        self.calibration = own_share(checked_text(calibration, self._needs_text()))
        self.prefix, self.blocks = find_blocks(model)
        self.chosen = self._chosen()
        if self.options.embeddings and method.requires:
            raise InputError(
                f"an embedding has no inputs that {type(method).__name__} could be calibrated on: leave out "
                "driver.embeddings, or choose a method without statistics (absmax, zeropoint, hqq, nf4)"
            )
        if options.head:
            refuse_tied(model, head_of(model)[0], "driver.head")
        if options.embeddings:
            refuse_tied(model, embedding_of(model)[0], "driver.embeddings")
        self.results: list[LayerResult] = []

    def run(self, directory: Path | None) -> list[LayerResult]:
        if directory is not None and in_parallel():
            raise InputError("several processes cannot keep one folder of finished blocks: leave out directory=")
        self._spill = None if directory is None else directory.parent
        journal = None if directory is None else Journal(directory, self._identity())
        self.progress.begin(len(self.blocks))
        try:
            with torch.no_grad(), _evaluating(self.model):
                with self._flow() as flow:
                    for index, block in enumerate(self.blocks):
                        self._block(index, block, flow, journal)
                if self.options.head:
                    self._head()
                if self.options.embeddings:
                    self._embeddings()
        finally:
            self.progress.end()
        return self.results

    # What is to be done

    def _needs_text(self) -> list[str]:
        """What cannot be done without calibration text."""
        needs = [f"{type(self.method).__name__}"] * bool(self.method.requires)
        needs += ["a static activation range"] * isinstance(self.activation, StaticActivation)
        return needs + ["SmoothQuant"] * (self.options.smoothquant is not None)

    def _chosen(self) -> dict[int, list[str]]:
        """The names, inside its block, of the linears of each block to quantize."""
        names = {
            f"{self.prefix}.{index}.{name}": (index, name)
            for index, block in enumerate(self.blocks)
            for name in linears_of(block)
        }
        include = matching(names, self.options.include, "driver.include")
        exclude = matching(names, self.options.exclude, "driver.exclude")
        kept = [name for name in names if name in include and name not in exclude]
        if not kept:
            raise InputError(
                f"nothing is left to quantize: driver.include={list(self.options.include)}, "
                f"driver.exclude={list(self.options.exclude)} of {len(names)} layers"
            )
        warn_of_the_rest(self.prefix, self.blocks)
        refuse_shared_weights(self.model, kept)
        chosen: dict[int, list[str]] = {index: [] for index in range(len(self.blocks))}
        for name in kept:
            index, inner = names[name]
            chosen[index].append(inner)
        return chosen

    def _wanted(self) -> set[Statistic]:
        errors = self.options.layer_errors and self.calibration is not None
        return set(self.method.requires) | ({Statistic.HESSIAN} if errors else set())

    def _identity(self) -> dict[str, object]:
        return {
            "method": self.method,
            "activation": self.activation,
            "driver": self.options,
            "calibration": self.calibration,
            "model": self.model,
        }

    def _flow(self) -> Flow:
        return Flow(
            self.model,
            self.blocks,
            self.calibration,
            batch_size=self.options.batch_size,
            memory_budget=self.options.memory_budget,
            full_precision=Statistic.CROSS in self.method.requires,
            directory=self._spill,
        )

    # Block by block

    def _block(self, index: int, block: nn.Module, flow: Flow, journal: Journal | None) -> None:
        began = time.perf_counter()
        self._smooth(index, block, flow)
        original = copy.deepcopy(block) if flow.full_precision else None  # smoothed: its inputs are in the same units
        resumed = journal is not None and journal.has(index)
        if journal is not None and resumed:
            self._restore(index, block, journal)
        else:
            first = len(self.results)
            stages = self._stages(index, block, flow)
            for together in [[stage] for stage in stages] if self.options.true_sequential else [stages]:
                self._collect_and_quantize(index, block, original, together, flow)
            self._charge(first, time.perf_counter() - began)
            if journal is not None:
                self._keep(index, block, journal, self.results[first:])
        if index + 1 < len(self.blocks) or self.options.head:
            flow.advance(index, block, original)
        self.progress.block(index + 1, resumed=resumed)

    def _keep(self, index: int, block: nn.Module, journal: Journal, results: list[LayerResult]) -> None:
        layers = {name: block.get_submodule(name) for name in self.chosen[index]}
        ranges: dict[str, Tensor] = {}  # of static activations
        for name, layer in layers.items():
            if isinstance(layer.activation, nn.Module):
                ranges |= {f"{name}|{key}": value for key, value in layer.activation.state_dict().items()}
        journal.keep(index, {name: layer.weight for name, layer in layers.items()}, ranges, results)  # pyright: ignore

    def _restore(self, index: int, block: nn.Module, journal: Journal) -> None:
        weights, ranges, results = journal.restore(index, self.device)
        for name, weight in weights.items():
            activation = self.activation
            if isinstance(activation, StaticActivation):
                own = {key.rpartition("|")[2]: value for key, value in ranges.items() if key.startswith(f"{name}|")}
                activation = activation.restored(own).to(self.device)
            layer = block.get_submodule(name)
            block.set_submodule(name, QuantizedLinear(weight, layer.bias, activation))  # pyright: ignore
        self.results += [_result(each) for each in results]

    def _stages(self, index: int, block: nn.Module, flow: Flow) -> list[list[str]]:
        """The chosen linears of a block, in the order in which the text reaches them; those with one input together."""
        names = self.chosen[index]
        if not len(flow):
            return [names]
        stages: list[list[str]] = []
        for hidden, _ in flow.states():
            missing = [name for name in names if all(name not in stage for stage in stages)]
            if not missing:
                return stages
            stages += sharing_an_input(block, missing, lambda hidden=hidden: flow.call(index, block, hidden))
        missing = [name for name in names if all(name not in stage for stage in stages)]
        if missing:
            raise InputError(
                f"no calibration token reaches {self.prefix}.{index}.{missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}: give more text "
                "(calibration.windows), or leave them out (driver.exclude)"
            )
        return stages

    def _collect_and_quantize(
        self, index: int, block: nn.Module, original: nn.Module | None, stages: list[list[str]], flow: Flow
    ) -> None:
        """A function of its own, so that nothing keeps these stages' Hessians while the next ones are collected."""
        for stage, inputs in zip(stages, self._collect(index, block, original, stages, flow), strict=True):
            self._quantize(f"{self.prefix}.{index}", block, stage, inputs)
            inputs.stats = None

    def _charge(self, first: int, seconds: float) -> None:
        """Put what a block took beside the method on its first layer's account."""
        rest = seconds - sum(result.seconds for result in self.results[first:])
        if len(self.results) > first:
            self.results[first] = replace(self.results[first], calibration_seconds=rest)

    def _collect(
        self, index: int, block: nn.Module, original: nn.Module | None, stages: list[list[str]], flow: Flow
    ) -> list[StageInputs]:
        """What each stage's method and activation quantizer have to know of its inputs."""
        columns = [weight_of(block.get_submodule(stage[0])).shape[1] for stage in stages]
        inputs = [StageInputs(self._wanted(), each, self.activation, self.device) for each in columns]
        if not any(each.wants_anything for each in inputs) or not len(flow):
            return inputs
        leads = {stage[0]: each for stage, each in zip(stages, inputs, strict=True)}
        for hidden, original_hidden in flow.states():
            expected: dict[str, list[Tensor]] = {name: [] for name in leads}
            if original is not None:
                with watched(original, list(leads), lambda name, x, seen=expected: seen[name].append(x), stop=True):
                    until_reached(lambda h=original_hidden: flow.call(index, original, h))

            def see(name: str, x: Tensor, expected: dict[str, list[Tensor]] = expected) -> None:
                leads[name].update(x, expected[name].pop(0) if expected[name] else None)

            with watched(block, list(leads), see, stop=True):
                until_reached(lambda h=hidden: flow.call(index, block, h))
        for name, each in leads.items():
            each.finish(f"{self.prefix}.{index}.{name}")
        return inputs

    def _quantize(self, prefix: str, parent: nn.Module, names: list[str], inputs: StageInputs) -> None:
        """Quantize the layers ``names`` of ``parent``, which all have these inputs, and put them in their places."""
        for name in names:
            layer, full_name = parent.get_submodule(name), f"{prefix}.{name}" if prefix else name
            quantized = self._quantized(full_name, weight_of(layer), inputs.stats)
            quantizer = inputs.quantizer()
            if isinstance(quantizer, nn.Module):
                quantizer = quantizer.to(self.device)
            replacement = QuantizedLinear(quantized, layer.bias, quantizer)  # pyright: ignore
            parent.set_submodule(name, replacement)

    def _quantized(self, name: str, weight: Tensor, stats: LayerStats | None) -> QuantizedWeight:
        """The quantized weight, and a line about it among the results."""
        began = time.perf_counter()
        try:
            quantized = self.method.quantize(weight, stats)
            seconds = time.perf_counter() - began
            values, exact = quantized.dequantize(), weight.float()
            if not bool(torch.isfinite(values).all()):
                raise InputError("the quantized weight has values that are not finite: check the weight and the method")
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        hessian = None if stats is None else stats.hessian
        error = None if hessian is None else relative_error(exact, values, hessian)
        size = float(exact.square().sum())
        weight_error = float((exact - values).square().sum()) / size if size else 0.0
        shape = (weight.shape[0], weight.shape[1])
        damping = None if stats is None else stats.damping
        result = LayerResult(name, shape, quantized.bits_per_weight, error, weight_error, seconds, damping)
        self.results.append(result)
        self.progress.layer(name, error)
        return quantized

    def _smooth(self, index: int, block: nn.Module, flow: Flow) -> None:
        """Migrate the outliers of the block's inputs into its weights (SmoothQuant), where that is asked for."""
        if self.options.smoothquant is not None:
            name = f"{self.prefix}.{index}"
            smooth_block_(block, flow, lambda hidden: flow.call(index, block, hidden), self.options.smoothquant, name)

    def _head(self) -> None:
        """Quantize the output head, calibrated on the whole quantized model."""
        name, head = head_of(self.model)
        inputs = StageInputs(self._wanted(), weight_of(head).shape[1], self.activation, self.device)
        if self.calibration is not None and inputs.wants_anything:
            # The full-precision hidden states end before the last norm: the head's target stays uncorrected.
            with watched(self.model, [name], lambda _, x: inputs.update(x, x), stop=True):
                for batch in self.calibration.split(self.options.batch_size):
                    until_reached(lambda batch=batch: self.model(batch.to(self.device), use_cache=False))
            inputs.finish(name)
        self._quantize("", self.model, [name], inputs)

    def _embeddings(self) -> None:
        """Quantize the input embedding, whose rows are looked up and never multiplied: it has no statistics."""
        name, embedding = embedding_of(self.model)
        weight = embedding.weight.detach()
        quantized = self._quantized(name, weight, None)
        self.model.set_submodule(name, QuantizedEmbedding(quantized, weight.dtype))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def _result(stored: dict[str, Any]) -> LayerResult:
    stored["shape"] = tuple(stored["shape"])
    return LayerResult(**stored)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and back in the mode it had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
