"""SmoothQuant: move the outliers of a layer's inputs into its weights, before either is quantized.

A few features of the inputs are much larger than the rest, and a scale per token has to cover them. Dividing feature j
by s_j and multiplying column j of the weights by it changes nothing in the product; with
``s_j = max|x_j|^alpha / max_i|W_ij|^(1 - alpha)`` the difficulty is shared. The division costs nothing where the
features come out of a module that scales them one by one anyway: it goes into the weight of the norm in front, or into
the rows of a linear layer whose outputs arrive as the features, times something.

Which module that is, is not looked up by name. `smoothing_pairs` multiplies the outputs of each candidate by powers of
two, which is exact, and sees which linear layers get exactly so multiplied inputs, and whether the block answers as
before once these divide them again. Source: Xiao et al., arXiv:2211.10438, eq. 3-4.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from bitnet.errors import InputError
from bitnet.nn.linears import weight_of
from bitnet.ptq.blocks import linears_of, watched
from bitnet.ptq.flow import Flow
from bitnet.ptq.protocol import Statistic
from bitnet.ptq.statistics import InputStatistics

SMALLEST = 1e-5  # largest magnitudes below count as this: their column and its inputs are as good as zero


@torch.no_grad()
def smooth_(
    producer: nn.Module, linears: Sequence[nn.Linear], absmax: Float[Tensor, " in"], alpha: float = 0.5
) -> Float[Tensor, " in"]:
    """Divide the outputs of ``producer`` by s and multiply the columns of ``linears`` by it, in place; returns s.

    Columns whose inputs or weights are all zero keep s = 1. Computed in float32 (float64 weights: in that) and rounded
    once to the dtype of each weight. Divide statistics of the inputs that were collected before by s.

    Args:
        producer: what the inputs come out of: a module with a ``weight`` [in] that its outputs are multiplied by (and
            perhaps a ``bias`` [in]), or a linear layer with ``in`` outputs.
        linears: all the layers that read these inputs.
        absmax: the largest magnitude of each input feature.
        alpha: 0 leaves the inputs as they are, 1 takes all differences out of them.

    Raises:
        InputError: alpha outside [0, 1], shapes that do not fit, or statistics that are not finite.
    """
    _check(producer, linears, absmax, alpha)
    dtype = torch.promote_types(linears[0].weight.dtype, torch.float32)
    largest_input = absmax.to(dtype)
    largest_weight = torch.stack([linear.weight.abs().amax(0).to(dtype) for linear in linears]).amax(0)
    s = largest_input.clamp(min=SMALLEST) ** alpha / largest_weight.clamp(min=SMALLEST) ** (1 - alpha)
    s = torch.where((largest_input == 0) | (largest_weight == 0), torch.ones_like(s), s)
    for parameter in _scaled_parameters(producer).values():
        rows = s.reshape(-1, *(1,) * (parameter.dim() - 1))
        parameter.copy_(parameter.to(dtype) / rows)
    for linear in linears:
        linear.weight.copy_(linear.weight.to(dtype) * s)
    return s


def smooth_block_(
    block: nn.Module, flow: Flow, call: Callable[[Tensor], Tensor], alpha: float, block_name: str
) -> None:
    """Smooth every pair of a block on the text that ``flow`` brings to it; ``call`` runs the block on hidden states.

    Raises:
        InputError: nothing in the block can take the division, or `smooth_` refuses.
    """
    layers = linears_of(block)
    largest = {
        name: InputStatistics([Statistic.ABSMAX], weight_of(layer).shape[1], weight_of(layer).device)
        for name, layer in layers.items()
    }
    first: Tensor | None = None
    with watched(block, list(layers), lambda name, x: largest[name].update(x)):
        for hidden, _ in flow.states():
            first = hidden if first is None else first
            call(hidden)
    assert first is not None
    probe = first
    pairs = smoothing_pairs(block, lambda: call(probe))
    if not pairs:
        raise InputError(
            f"SmoothQuant finds no norm in {block_name} whose outputs nn.Linear layers alone read: leave out "
            "driver.smoothquant"
        )
    for norm, names in pairs:
        statistics = largest[names[0]]
        statistics.all_reduce()
        absmax = statistics.finish(f"{block_name}.{names[0]}").absmax
        assert absmax is not None
        smooth_(
            block.get_submodule(norm), [cast(nn.Linear, block.get_submodule(name)) for name in names], absmax, alpha
        )


@torch.no_grad()
def smoothing_pairs(
    block: nn.Module, run: Callable[[], Any], *, through_linears: bool = False
) -> list[tuple[str, list[str]]]:
    """Each module of ``block`` that can take the division, with the names of the linear layers that read its outputs.

    Args:
        block: in evaluation mode.
        run: calls the block on some inputs, the same at every call, and returns what it answers: a tensor, or a tuple
            whose first element is one.
        through_linears: also linear layers in front (up_proj for down_proj; v_proj for o_proj, unless heads are
            shared).

    Raises:
        InputError: ``run`` does not answer the same twice.
    """
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    before, inputs = _observe(run, linears)
    if not torch.equal(before, _observe(run, linears)[0]):
        raise InputError("the block answers differently on the same inputs: set it to evaluation mode")
    pairs = []
    for name, module in block.named_modules():
        width = _output_width(module)
        if width is None or (isinstance(module, nn.Linear) and not through_linears):
            continue
        factors = _powers_of_two(width).to(before.device)
        with _outputs_times(module, factors):
            after, changed = _observe(run, linears)
        readers = [
            other
            for other, x in inputs.items()
            if x.shape[-1] == width and not torch.equal(changed[other], x) and _is_product(changed[other], x, factors)
        ]
        if not readers or not _scales_its_outputs(module, run):
            continue
        with _outputs_times(module, factors), ExitStack() as stack:
            for other in readers:
                stack.enter_context(_inputs_times(linears[other], 1 / factors))
            after, _ = _observe(run, linears)
        if torch.equal(after, before):  # nothing else reads these outputs
            pairs.append((name, readers))
    return pairs


def _check(producer: nn.Module, linears: Sequence[nn.Linear], absmax: Tensor, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be between 0 and 1, got {alpha}")
    if not linears:
        raise InputError("smoothing needs the linear layers that read the inputs, got none")
    width = _output_width(producer)
    widths = {width, absmax.shape[-1], *(linear.in_features for linear in linears)}
    if width is None or len(widths) > 1:
        raise InputError(
            f"a {type(producer).__name__} of {width} outputs does not fit {absmax.shape[-1]} statistics and linear "
            f"layers of {[linear.in_features for linear in linears]} inputs: take pairs from smoothing_pairs"
        )
    if not bool((torch.isfinite(absmax) & (absmax >= 0)).all()):
        raise InputError("the largest magnitudes of the inputs must be finite and not negative: check the calibration")


def _output_width(module: nn.Module) -> int | None:
    """Outputs of a module whose weight's rows scale them one by one; None for others."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or next(module.children(), None) is not None:
        return None
    return len(weight) if isinstance(module, nn.Linear) or weight.dim() == 1 else None


def _scaled_parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name in ("weight", "bias") if isinstance(p := getattr(module, name, None), nn.Parameter)}


def _powers_of_two(width: int) -> Tensor:
    return 2.0 ** torch.randint(-2, 3, (width,), generator=torch.Generator().manual_seed(0)).float()


def _is_product(changed: Tensor, x: Tensor, factors: Tensor) -> bool:
    return torch.equal(changed, x * factors.to(x.dtype))


def _scales_its_outputs(module: nn.Module, run: Callable[[], Any]) -> bool:
    """Whether twice the weight (and bias) gives twice the output: not so for a norm that adds 1 to its weight."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    args, kwargs, output = calls[0]
    doubled = {name: 2 * parameter for name, parameter in _scaled_parameters(module).items()}
    return torch.equal(functional_call(module, doubled, args, kwargs), 2 * output)


def _observe(run: Callable[[], Any], linears: dict[str, nn.Linear]) -> tuple[Tensor, dict[str, Tensor]]:
    """What the block answers, and what each linear layer reads."""
    inputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, linear in linears.items():

            def keep(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                inputs[name] = args[0].clone()

            stack.callback(linear.register_forward_pre_hook(keep).remove)
        answer = run()
    return (answer if isinstance(answer, Tensor) else answer[0]), inputs


@contextmanager
def _outputs_times(module: nn.Module, factors: Tensor) -> Iterator[None]:
    def multiply(_module: nn.Module, _args: Any, output: Any) -> Any:
        fits = isinstance(output, Tensor) and output.shape[-1:] == factors.shape
        return output * factors.to(output.dtype) if fits else output

    handle = module.register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _inputs_times(module: nn.Module, factors: Tensor) -> Iterator[None]:
    def multiply(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * factors.to(args[0].dtype), *args[1:])

    handle = module.register_forward_pre_hook(multiply)
    try:
        yield
    finally:
        handle.remove()
