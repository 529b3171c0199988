"""What a kernel's machine code says about its speed, without a GPU: registers, spills, load widths, instructions.

``python -m bitnet.ops.cuda.census`` prints the table for every architecture. It needs NVRTC and NVIDIA's disassembler
(``cuobjdump``, which triton brings along, and so does ``pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm``).
"""

import collections
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bitnet.ops.build import BuildError
from bitnet.ops.cuda.nvrtc import machine_code

ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
PRODUCTS = ("IDP", "IMMA")  # dp4a; int8 tensor cores
TOKENS = {"multiply_1": 1, "multiply_2": 2}  # that share the weights a thread has loaded

Instructions = list[tuple[int, str]]  # (address, text)


@dataclass(frozen=True, slots=True)
class Census:
    """One kernel's machine code.

    Attributes:
        registers: of a thread.
        spills: instructions that move a register to or from memory.
        loop: instructions by name in the innermost loop with the most products, else in the whole kernel.
        loads: instructions in that loop that load from global memory, by bits.
    """

    kernel: str
    registers: int
    spills: int
    loop: collections.Counter[str]
    loads: collections.Counter[int]

    @property
    def products(self) -> int:
        return sum(self.loop[each] for each in PRODUCTS)

    @property
    def others_a_product(self) -> float:
        """Instructions beside each product."""
        return (self.loop.total() - self.products) / self.products

    @property
    def instructions_a_weight(self) -> float | None:
        """Instructions of a thread for each weight of the dp4a kernels, whose products take 4 weights and one token."""
        tokens = TOKENS.get(self.kernel)
        return None if tokens is None else self.loop.total() * tokens / (4 * self.products)


def census(code: bytes) -> dict[str, Census]:
    """Every kernel of a cubin.

    Raises:
        BuildError: there is no disassembler, or it fails.
    """
    tool = disassembler()
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}  # it calls nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(tool), "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr}")
    registers = re.findall(r"Function (\w+):\s+REG:(\d+)", done.stdout)
    bodies = instructions_of(done.stdout)
    return {name: counted(name, int(number), bodies[name]) for name, number in registers}


def disassembler() -> Path:
    """``cuobjdump``: on the path, or in a wheel of NVIDIA or triton.

    Raises:
        BuildError: there is none.
    """
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        return Path(on_path)
    for package, place in (("nvidia", "*/bin/cuobjdump"), ("triton", "backends/nvidia/bin/cuobjdump")):
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or []:
            for path in sorted(Path(root).glob(place)):
                return path
    raise BuildError("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or triton")


def instructions_of(listing: str) -> dict[str, Instructions]:
    """Instructions by kernel in the listing of ``cuobjdump -sass``."""
    bodies, name = dict[str, Instructions](), ""
    for line in listing.splitlines():
        if found := re.search(r"Function : (\w+)", line):
            name = found[1]
            bodies[name] = []
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?) ?;", line):
            bodies[name].append((int(found[1], 16), found[2]))
    return bodies


def counted(name: str, registers: int, body: Instructions) -> Census:
    loop = max(innermost_loops(body), key=lambda each: count(each, PRODUCTS), default=body)
    loop = loop if count(loop, PRODUCTS) else body
    names = collections.Counter(opcode(text).split(".")[0] for _, text in loop)
    loads = collections.Counter(bits_of(opcode(text)) for _, text in loop if opcode(text).startswith("LDG."))
    return Census(name, registers, count(body, ("LDL", "STL")), names, loads)


def innermost_loops(body: Instructions) -> list[Instructions]:
    """Stretches from the target of a backward branch to the branch that hold no other such stretch."""
    ends = list[tuple[int, int]]()
    for address, text in body:
        found = re.search(r"0x([0-9a-f]+)", text) if opcode(text).startswith("BRA") else None
        if found and int(found[1], 16) < address:
            ends.append((int(found[1], 16), address))
    inner = [a for a in ends if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in ends)]
    return [[each for each in body if first <= each[0] <= last] for first, last in inner]


def count(body: Instructions, names: tuple[str, ...]) -> int:
    return sum(opcode(text).split(".")[0] in names for _, text in body)


def opcode(text: str) -> str:
    """ "LDG.E.128.CONSTANT" of "@!P0 LDG.E.128.CONSTANT R4, [R2]"."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split(" ")[0].rstrip(",")


def bits_of(load: str) -> int:
    """Bits of a load by the parts of its name; 32 where none says so."""
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[part] for part in load.split(".") if part in widths), 32)


def table() -> str:
    """Markdown: a row for each kernel that multiplies and each architecture.

    Raises:
        BuildError: no compiler, no disassembler, or an error of theirs.
    """
    titles = ("device", "kernel", "registers", "spills", "instructions in the loop", "products", "others a product")
    rows: list[tuple[str, ...]] = [(*titles, "instructions a weight", "loads in the loop")]
    rows.append(("---",) * len(rows[0]))
    for major, minor in ARCHITECTURES:
        for each in census(machine_code((major, minor))).values():
            if each.products:
                a_weight = each.instructions_a_weight
                rows.append(
                    (
                        f"sm_{major}{minor}",
                        each.kernel,
                        str(each.registers),
                        str(each.spills),
                        str(each.loop.total()),
                        str(each.products),
                        f"{each.others_a_product:.2f}",
                        "" if a_weight is None else f"{a_weight:.2f}",
                        ", ".join(f"{number} x {bits} bit" for bits, number in sorted(each.loads.items())),
                    )
                )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
