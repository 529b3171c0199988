"""Everything about packed layers that waits for a GPU, in one command and under ten minutes: are they right, how fast?

    python benchmarks/gpu.py                        # checks, then times; prints Markdown and writes it to gpu.md
    python benchmarks/gpu.py                        # the same again: goes on where it was stopped
    python benchmarks/gpu.py --rehearse             # a small run on the CPU: that this script works
    python benchmarks/gpu.py --roofline             # no GPU needed: what the bytes allow on known ones
    python -m bitnet.ops.cuda.census                # no GPU needed: what the machine code says

Checks (gpu_checks.py): every kernel, dtype and shape bit for bit against the reference on the CPU; NaN and infinity;
CUDA graphs, streams, threads; no synchronization in a call or a training step; torch.compile; trained, frozen and
packed layers; generation. One that fails is a line of the report, and exit code 1.
Times (gpu_times.py): the operator (quantizing the inputs included) and the multiplication alone, beside bfloat16
`linear` and `torch._int_mm`, on the shapes of BitNet-2B4T. Calls go through as many copies of the weight as it takes to
leave the cache, inside one CUDA graph, all candidates in turn round after round; printed are medians. Fractions of
bandwidth are of what a copy reads and writes on the same device in the same run.

The report is a section for docs/lab-notes.md. Each finished part is kept in a file beside it, and is not run again on
the same device with the same software and sources; a part that failed is. Exit code 3: the time was over before all
parts were run.
"""

import argparse
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpu_checks import CHECKS, checked
from gpu_times import (
    GENERATION,
    MEMORY,
    SHAPES,
    STREAMED,
    THRESHOLDS,
    TIMED,
    TOKENS,
    bandwidth,
    generation,
    memory,
    roofline,
    thresholds,
    timed,
)

from bitnet.files import atomic_file

HERE = Path(__file__).parent
SOURCES = (*sorted(HERE.glob("gpu*.py")), *sorted((HERE.parent / "bitnet" / "ops" / "cuda").glob("*.*")))


@dataclass(frozen=True)
class Part:
    """A piece of the report that is run, and kept, as a whole.

    Attributes:
        table: the heading of the table that its lines belong to.
        run: gives the lines, and whether all is well.
    """

    name: str
    table: str
    run: Callable[[], tuple[list[str], bool]]


@dataclass
class Kept:
    """Parts that are done: name -> lines; in a file that is of one machine and one state of the sources."""

    path: Path
    machine: dict[str, str]
    parts: dict[str, list[str]] = field(default_factory=dict)

    def load(self) -> None:
        """Take over what an earlier run on the same machine left."""
        if self.path.exists():
            earlier = json.loads(self.path.read_text())
            same = earlier["machine"] == self.machine
            print(
                f"{self.path}: {'going on' if same else 'of another machine or version, begun anew'}", file=sys.stderr
            )
            self.parts = earlier["parts"] if same else {}

    def add(self, name: str, lines: list[str]) -> None:
        self.parts[name] = lines
        with atomic_file(self.path) as partial:
            partial.write_text(json.dumps({"machine": self.machine, "parts": self.parts}))


TABLES = {
    "checks": ["| check | result | seconds |", "|---|---|---|"],
    "copy": [],
    "times": TIMED,
    "generation": GENERATION,
    "memory": MEMORY,
    "thresholds": THRESHOLDS,
}


def parts_of(device: torch.device, rehearse: bool) -> list[Part]:
    """All parts, what is wanted most first."""
    shapes, tokens, streamed = (((64, 128),), (1, 20), 1 << 14) if rehearse else (SHAPES, TOKENS, STREAMED)

    def check(name: str) -> tuple[list[str], bool]:
        line, passed = checked(name, device, rehearse)
        return [line], passed

    def copied() -> tuple[list[str], bool]:
        return [f"A copy moves {bandwidth(device, streamed) / 1e9:.0f} GB/s here."], True

    parts = [Part(name, "checks", lambda name=name: check(name)) for name in CHECKS]
    parts.append(Part("copy", "copy", copied))
    for out, columns in reversed(shapes):
        run = lambda at=(out, columns): (timed(*at, device, tokens, streamed), True)  # noqa: E731
        parts.append(Part(f"times {out} x {columns}", "times", run))
    forms = [(form, graph) for form in ("packed", "bf16") for graph in (True, False)]
    size, steps = ("nano", 3) if rehearse else ("125m", 128)
    for form, graph in forms[1::2] if rehearse else forms:
        run = lambda form=form, graph=graph: ([generation(form, graph, device, size, steps)], True)  # noqa: E731
        parts.append(Part(f"generation {form} {graph}", "generation", run))
    if device.type == "cuda":
        parts.append(Part("memory", "memory", lambda: ([memory(*each, device) for each in SHAPES], True)))
        for out, columns in SHAPES[:1] + SHAPES[-1:]:
            run = lambda at=(out, columns): (thresholds(*at, device, streamed), True)  # noqa: E731
            parts.append(Part(f"thresholds {out} x {columns}", "thresholds", run))
    return parts


def run_parts(parts: list[Part], kept: Kept, seconds: float) -> tuple[dict[str, list[str]], list[str]]:
    """Run what is not kept as long as there is time; (lines of parts that failed, names of parts that were not run)."""
    ends, failed, left = time.monotonic() + seconds, dict[str, list[str]](), list[str]()
    for each in parts:
        if each.name in kept.parts:
            continue
        if time.monotonic() > ends:
            left.append(each.name)
            continue
        print(f"{each.name} ...", file=sys.stderr, flush=True)
        try:
            lines, passed = each.run()
        except Exception as error:  # later parts may still tell something
            lines, passed = [f"{each.name}: {type(error).__name__}: {error}"], False
        if passed:
            kept.add(each.name, lines)
        else:
            failed[each.name] = lines  # in this report, and not in the file: it is run again
    return failed, left


def report(parts: list[Part], kept: Kept, failed: dict[str, list[str]], left: list[str]) -> list[str]:
    """A section for the lab notes."""
    software = f"torch {kept.machine['torch']}, CUDA {kept.machine['cuda']}, driver {kept.machine['driver']}"
    lines = [f"## {datetime.date.today()}: packed layers on {kept.machine['device']}", ""]
    lines += [f"`python benchmarks/gpu.py`, {software}:", ""]
    done = {**kept.parts, **failed}
    for name, heading in TABLES.items():
        rows = [line for each in parts if each.table == name for line in done.get(each.name, [])]
        lines += [*heading, *rows, ""] if rows else []
    lines += [f"FAILED: {name}" for name in sorted(failed)] or ["All that was run passed."]
    lines += [f"Not run, the time was over: {', '.join(left)}."] if left else []
    return lines


def machine_of(device: torch.device) -> dict[str, str]:
    digest = hashlib.sha256(b"".join(each.read_bytes() for each in SOURCES)).hexdigest()[:16]
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "the CPU, a rehearsal",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "driver": str(torch._C._cuda_getDriverVersion()) if on_gpu else "none",  # type: ignore[attr-defined]
        "sources": digest,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="a small run on the CPU")
    parser.add_argument("--roofline", action="store_true", help="what the bytes allow on known devices; no GPU needed")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="file for the report (default: gpu.md)")
    parser.add_argument("--minutes", type=float, default=9, help="begin no part after so many (default: 9)")
    options = parser.parse_args(arguments)
    if options.roofline:
        print("\n".join(roofline()))
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device: --rehearse runs a little of it on the CPU, --roofline needs none", file=sys.stderr)
        return 2
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    kept, parts = Kept(options.out.with_suffix(".json"), machine_of(device)), parts_of(device, options.rehearse)
    kept.load()
    failed, left = run_parts(parts, kept, options.minutes * 60)
    lines = report(parts, kept, failed, left)
    print("\n".join(lines))
    options.out.write_text("\n".join(lines) + "\n")
    print(f"\n{options.out} is a section for docs/lab-notes.md; {kept.path} keeps what is done", file=sys.stderr)
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
