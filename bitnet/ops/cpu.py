"""What ``torch.ops.bitnet.packed_linear`` runs on where tensors are in main memory.

The first of these that works: compiled kernels (`bitnet.ops.native`), PyTorch's int8 product, the reference in plain
PyTorch. All three answer the same bits. Which one runs, and why not one before it, is what ``python -m bitnet.ops``
prints; not to run the first is also said by a warning.
"""

import functools
import itertools
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bitnet.ops.build import BuildError, FolderError, library
from bitnet.ops.int8 import int8_linear
from bitnet.ops.native import LAYOUTS, TYPES, Matrix, Native, Plan
from bitnet.ops.packed_linear import LIBRARY, check_arguments, reference_linear
from bitnet.ops.reference import EXACT_SUM
from bitnet.ops.remembered import Remembered
from bitnet.quant.packing import pack

LONGEST_ROW = EXACT_SUM // 128  # columns: up to here float32 holds every sum, and results are exact
_sound = Remembered[None](uncounted=True)
_plans = Remembered[Plan | None](uncounted=True)


@dataclass(frozen=True)
class Choice:
    """What runs: a tier of the compiled kernels, "int8" or "reference"; and why not what comes before it."""

    name: str
    native: Native | None = None
    refused: dict[str, str] = field(default_factory=dict)


@functools.cache
def choice() -> Choice:
    """What this process runs on; compiles the kernels if need be."""
    refused = dict[str, str]()
    try:
        native = compiled()
        for tier in native.tiers:
            fault = fault_of(native, tier)
            if fault is None:
                return Choice(tier, native, refused)
            refused[tier] = fault
    except (BuildError, OSError) as error:
        refused["native"] = str(error)
    name = "int8"
    try:
        torch._int_mm(torch.ones(1, 3, dtype=torch.int8), torch.ones(3, 2, dtype=torch.int8))
    except RuntimeError as error:
        name, refused["int8"] = "reference", f"torch._int_mm: {error}"
    warnings.warn(
        f"packed layers run on {name}, many times slower than compiled kernels: {refused}. python -m bitnet.ops says "
        "more",
        RuntimeWarning,
        stacklevel=2,
    )
    return Choice(name, None, refused)


def compiled() -> Native:
    """The compiled kernels, loaded; compiles them if need be.

    Where the cache folder cannot be used they are compiled, by every process anew, into a temporary folder that only
    this user can read or write, and that is removed once they are loaded. A warning says so.

    Raises:
        BuildError: nothing could be compiled.
        OSError: there is no temporary folder either, or the library does not load from there.
    """
    try:
        path = library()
        try:
            return Native(path)
        except OSError as error:
            raise FolderError(
                f"{path} does not load ({error}): if its file system is mounted noexec, set XDG_CACHE_HOME to a folder "
                "on another one"
            ) from error
    except FolderError as error:
        warnings.warn(
            f"kernels for packed layers are compiled for this process alone, which takes seconds: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        with tempfile.TemporaryDirectory(prefix="bitnet-kernels-") as folder:
            return Native(library(Path(folder)))


def cpu_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: str, activation: str = "absmax"
) -> Tensor:
    """The operator on a CPU, for arguments that have passed its checks."""
    chosen, columns = choice(), x.shape[-1]
    if chosen.name == "reference" or columns > LONGEST_ROW:
        return reference_linear(x, packed, scale, bias, layout, activation)
    if chosen.native is None:
        return int8_linear(x, packed, scale, bias, layout, activation)
    native = chosen.native
    place = 0 if bias is None else bias.data_ptr()
    key = layout, columns, activation, scale.data_ptr(), len(scale), place, None if bias is None else bias.dtype
    plan = _plans.get(packed, key, lambda: _plan(native, packed, scale, bias, layout, activation, columns, chosen.name))
    return native(x, packed, scale, bias, layout, activation, chosen.name) if plan is None else plan(x)


def _plan(
    native: Native,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: str,
    activation: str,
    columns: int,
    tier: str,
) -> Plan | None:
    """A plan of these tensors' addresses; None where one of them is not in order, and has to be copied for a call."""
    _sound.get(packed, (layout, columns), lambda: native.refuse_damaged(packed, layout, columns))
    parts = (packed, scale) if bias is None else (packed, scale, bias)
    if not all(each.is_contiguous() for each in parts):
        return None
    return Plan(native, Matrix(packed, scale, bias, layout, activation, columns), tier)


def fault_of(native: Native, tier: str) -> str | None:
    """Why a tier must not run, None if it answers like the reference on small problems of every layout and dtype.

    An instruction set that this project could not test, or a compiler that gets one wrong, must not answer for a model.
    """
    draw = torch.Generator().manual_seed(0)
    for layout in LAYOUTS:
        codes = torch.randint(0, 2, (35, 700), generator=draw, dtype=torch.int8) * 2 - 1
        packed, scale = pack(codes, layout), torch.rand(35, 1, generator=draw)
        for tokens, dtype in itertools.product((1, 7, 33), TYPES):
            x, added = torch.randn(tokens, 700, generator=draw).to(dtype), torch.randn(35, generator=draw).to(dtype)
            for bias in (None, added):
                arguments = x, packed, scale, bias, layout, "absmax"
                if not torch.equal(native(*arguments, tier), reference_linear(*arguments)):
                    problem = f"layout {layout} with {tokens} rows of {dtype}{'' if bias is None else ' and a bias'}"
                    return f"wrong results in {problem}: this is a bug, please report it"
    return None


def _checked(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: str, activation: str = "absmax"
) -> Tensor:
    check_arguments(x, packed, scale, bias, layout, activation)
    return cpu_linear(x, packed, scale, bias, layout, activation)


LIBRARY.impl("packed_linear", _checked, "CPU")
