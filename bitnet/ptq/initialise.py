"""Where quantization-aware training of a pretrained model starts: latent weights with good codes.

Converting a model leaves its weights as they are, and what they round to was never chosen: it is whatever their layer's
quantizer makes of them. Here the codes are found as a post-training method finds them, block by block, each calibrated
on what the already quantized blocks give it (`bitnet.ptq.quantize` does that), but on the grid of each layer's own
quantizer; then the latent weights are set such that this quantizer answers with these codes.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bitnet.errors import InputError
from bitnet.nn import BitLinear, bit_linears
from bitnet.ptq.blocks import find_blocks, head_of
from bitnet.ptq.driver import quantize
from bitnet.ptq.progress import Progress
from bitnet.ptq.protocol import LayerStats, Statistic
from bitnet.ptq.settings import Driver, LayerResult
from bitnet.ptq.starts import Start
from bitnet.quant import LearnedScale, QTensor
from bitnet.quant.latent import latent_weight
from bitnet.quant.layer_grid import LayerGrid


def initialise(
    model: nn.Module,
    start: Start,
    calibration: Int64[Tensor, "windows window"] | None = None,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[LayerResult]:
    """Set the latent weights of every `BitLinear` of ``model``, and learned scales, in place; say what became of each.

    Draws no random numbers. Holds the new weights beside the old ones until the last layer is done; whatever fails, the
    model is then as it was.

    Args:
        model: a converted causal language model (`bitnet.convert`), float32.
        start: `LeastSquares`, `Compensated`, `FromMethod`.
        calibration: token ids; None for a start that needs none.
        batch_size: windows in one forward pass.
        progress: is told of every layer and block.

    Raises:
        InputError: no converted layer, one outside the blocks that is not the head, layers of different quantizers, a
            quantizer that no latent weights can be set for, or latent weights that are not float32.
    """
    layers = dict(bit_linears(model))
    grid, activation = _check(layers)
    recorder = _Recorder(start, grid)
    if start.requires and calibration is None:
        raise InputError(f"{type(start).__name__} needs calibration text: give token ids [windows, window]")
    calibration = calibration if start.requires else None
    try:
        for name, layer in layers.items():
            model.set_submodule(name, _dense(layer))
        driver = Driver(include=_inside(model, layers), head=_with_head(model, layers), batch_size=batch_size)
        results = quantize(model, recorder, calibration, activation=activation, driver=driver, progress=progress)
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
    with torch.no_grad():
        for result, (latent, scale) in zip(results, recorder.found, strict=True):
            layer = layers[result.name]
            layer.weight.copy_(latent)
            if isinstance(layer.quantizer, LearnedScale):
                layer.quantizer.scale.copy_(scale)
    return results


class _Recorder:
    """A post-training method whose result is what the layer's quantizer makes of the latent weights it finds."""

    def __init__(self, start: Start, grid: "_Quantizer") -> None:
        self._start, self._quantizer = start, grid
        self.found: list[tuple[Float[Tensor, "out in"], Float[Tensor, "rows groups"]]] = []

    @property
    def requires(self) -> frozenset[Statistic]:
        return self._start.requires

    @property
    def claimed_bits(self) -> float:
        raise NotImplementedError("it is no method to be recorded")

    def quantize(self, weight: Float[Tensor, "out in"], stats: LayerStats | None) -> QTensor:
        codes, scale = self._start.begin(weight, self._quantizer.grid, stats)
        latent = latent_weight(self._quantizer.grid, weight, codes, scale, self._start.depth)
        self.found.append((latent, scale))
        return self._quantizer.quantize(latent, scale)


class _Quantizer:
    """The quantizer that all layers have, each with its own scale where that is learned."""

    def __init__(self, quantizer: Any) -> None:
        self.grid = LayerGrid.of(quantizer)
        self.rule: Any = quantizer.rule if isinstance(quantizer, LearnedScale) else quantizer
        self._learned = isinstance(quantizer, LearnedScale)

    def quantize(self, latent: Tensor, scale: Tensor) -> QTensor:
        return self.rule.quantize(latent, scale) if self._learned else self.rule(latent)


def _check(layers: dict[str, BitLinear]) -> tuple[_Quantizer, Any]:
    """The quantizers that all layers share: of the weight and of the input."""
    if not layers:
        raise InputError("the model has no BitLinear to initialise: convert it first (bitnet.convert)")
    for name, layer in layers.items():
        if layer.weight.dtype != torch.float32:
            raise InputError(
                f"latent weights are set in float32, got {layer.weight.dtype} in {name}: call model.float() first"
            )
        if is_parametrized(layer, "weight"):
            raise InputError(f"{name} has an adapter: initialise first, then add adapters (bitnet.nn.LatentLoRA)")
    quantizers = [_Quantizer(layer.quantizer) for layer in layers.values()]
    activations = {id(layer.activation): layer.activation for layer in layers.values()}
    if any(each.rule != quantizers[0].rule for each in quantizers) or len(activations) > 1:
        raise InputError("layers of different quantizers cannot be initialised together: convert them all alike")
    return quantizers[0], next(iter(activations.values()))


def _dense(layer: BitLinear) -> nn.Linear:
    """The same latent weight, shared, in a plain linear layer."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight, dense.bias = layer.weight, layer.bias
    return dense.train(layer.training)


def _inside(model: nn.Module, layers: dict[str, BitLinear]) -> list[str]:
    prefix, _ = find_blocks(model)
    inside = [name for name in layers if name.startswith(f"{prefix}.")]
    outside = set(layers) - set(inside) - ({head_of(model)[0]} if _with_head(model, layers) else set())
    if outside:
        raise InputError(f"{sorted(outside)[0]} is in no block and cannot be initialised: exclude it, or set init=none")
    return inside


def _with_head(model: nn.Module, layers: dict[str, BitLinear]) -> bool:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return any(model.get_submodule(name) is head for name in layers)
