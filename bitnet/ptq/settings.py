"""How a method is taken through a model, and what comes back of each layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from bitnet.errors import InputError


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What became of one layer.

    Attributes:
        name: in the model.
        shape: (out, in).
        bits_per_weight: every stored bit counted.
        relative_error: ``tr(D H D^T) / tr(W H W^T)``; None where no calibration text was given.
        weight_error: ``||D||^2 / ||W||^2``.
        seconds: of the method, without the collection of statistics.
        damping: share of the Hessian's mean diagonal that was added to it: what the method was told, or more where that
            did not make it positive definite; None where no Hessian was factored.
        calibration_seconds: what its block took beside the method (forward passes, statistics); on the block's first
            layer, 0 on the others.
    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    relative_error: float | None
    weight_error: float
    seconds: float
    damping: float | None = None
    calibration_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """How a method is taken through a model.

    Args:
        batch_size: windows of the calibration text in one forward pass.
        true_sequential: collect the inputs of each stage anew, with the stages before it quantized already; else those
            of all stages of a block at once (faster; as many Hessians at a time as a block has stages).
        smoothquant: strength, 0 to 1, of the migration of the activations' outliers into the weights; None: off.
        include: patterns of the layers to quantize, as in `bitnet.convert`.
        exclude: patterns of the layers to leave.
        head: quantize the output head, too.
        embeddings: quantize the input embedding, too, an entry like a row of a weight; for methods without statistics.
        layer_errors: measure every layer's error on the calibration text, even where the method does not need it.
        memory_budget: bytes of hidden states to keep in memory; the rest goes to files.
    """

    batch_size: int = 8
    true_sequential: bool = True
    smoothquant: float | None = None
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    head: bool = False
    embeddings: bool = False
    layer_errors: bool = True
    memory_budget: float = 2e9

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            if isinstance(patterns := getattr(self, name), str):
                object.__setattr__(self, name, (patterns,))
        for name in ("true_sequential", "head", "embeddings", "layer_errors"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"driver.{name} must be true or false, got {getattr(self, name)!r}")
        if type(self.batch_size) is not int:
            raise InputError(f"driver.batch_size must be a whole number, got {self.batch_size!r}")
        if isinstance(self.memory_budget, str):
            raise InputError(f"driver.memory_budget must be a number of bytes, got {self.memory_budget!r}")
        if self.batch_size < 1:
            raise InputError(f"driver.batch_size must be at least 1, got {self.batch_size}")
        if self.smoothquant is not None and not 0 <= self.smoothquant <= 1:
            raise InputError(f"driver.smoothquant must be between 0 and 1, or null for none, got {self.smoothquant}")
        if self.memory_budget < 0:
            raise InputError(f"driver.memory_budget is a number of bytes, got {self.memory_budget}")
