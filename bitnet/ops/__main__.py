"""``python -m bitnet.ops``: what packed layers run on here, and why not on something faster."""

import torch

from bitnet.ops import cuda
from bitnet.ops.build import BuildError, openmp_problem
from bitnet.ops.cpu import Choice, choice, compiled, fault_of
from bitnet.ops.native import BEST_FIRST, Native


def main() -> None:
    """Print a line for each thing that could run, the chosen one marked."""
    chosen, problem = choice(), ""
    native = chosen.native
    try:
        native = native or compiled()
    except (BuildError, OSError) as error:
        problem = str(error)
    print("packed_linear on the CPU, the best first (* runs):")
    for name, state in states(native, problem, chosen):
        print(f"  {'*' if name == chosen.name else ' '} {name:10} {state}")
    if native is not None:
        gone = (
            "" if native.path.exists() else " (removed: no cache folder that can be written, compiled in every process)"
        )
        print(f"library     {native.path}{gone}")
    print(f"threads     {threads(chosen)}")
    for device, state in cuda.states():
        print(f"{device}: {state}")


def states(native: Native | None, problem: str, chosen: Choice) -> list[tuple[str, str]]:
    """(name, what is known of it), the best first."""
    found = list[tuple[str, str]]()
    for tier in BEST_FIRST:
        if native is None:
            found.append((tier, f"not compiled: {problem}"))
        elif tier not in native.tiers:
            found.append((tier, "this processor or library has none"))
        else:
            fault = fault_of(native, tier)
            found.append((tier, "equals the reference" if fault is None else fault))
    found.append(("int8", chosen.refused.get("int8", "torch._int_mm, codes unpacked to a byte each")))
    found.append(("reference", "plain PyTorch, codes unpacked in every call"))
    return found


def threads(chosen: Choice) -> str:
    """How many threads a product runs on."""
    if chosen.native is not None and not chosen.native.parallel:
        problem = openmp_problem()
        if problem is None:
            return f"1: compiled without OpenMP, which the compiler now has: remove {chosen.native.path}"
        return f"1: compiled without OpenMP: {problem}"
    return f"{torch.get_num_threads()} (torch.get_num_threads())"


if __name__ == "__main__":
    main()
