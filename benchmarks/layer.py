"""What does a training step of BitLinear158 cost, beside a dense layer and the other implementations?

    python benchmarks/layer.py                       # one linear layer, 2560 -> 6912, 2048 tokens
    python benchmarks/layer.py --what block          # a whole decoder block of the 125M model
    python benchmarks/layer.py --threads 1 --tokens 1024
    python benchmarks/layer.py --bfloat16 --tokens 128      # minutes a step for 2048 where a CPU has no bfloat16 units

A step is forward plus backward, for the input and the weight. All layers are timed in turn within one process, round
after round, so that a slow moment of the machine meets all of them; printed are medians and their ratios to the dense
float32 layer. Peak memory is of one step, above what layer and input occupy, each in a process of its own (Linux).
`pip install --no-deps bitlinear` adds the package of that name to the comparison.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitnet import BitLinear158
from bitnet.models import Size, causal_lm
from bitnet.nn import convert

WIDTHS = (2560, 6912)
BLOCK = Size(
    hidden_size=768, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=12, num_key_value_heads=12
)
Make = Callable[[nn.Linear], nn.Module]


def auto_bit_linear(linear: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.integrations.bitnet import AutoBitLinear
    return AutoBitLinear(linear.in_features, linear.out_features, bias=False, online_quant=True)


def pypi_bitlinear(linear: nn.Linear) -> nn.Module:
    from bitlinear import BitLinear  # type: ignore[import-not-found]

    return BitLinear(linear.in_features, linear.out_features, bias=False, norm=None)


class Block(nn.Module):
    """One decoder block of the 125M model with its rotary positions; hidden states in, hidden states out."""

    def __init__(self, make: Make | None) -> None:
        super().__init__()
        self.body = causal_lm(vocab_size=8, size=BLOCK).model
        if make is not None:
            convert(self.body, make)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(inputs_embeds=x, use_cache=False).last_hidden_state


def layer(what: str, make: Make | None) -> nn.Module:
    if what == "block":
        return Block(make)
    linear = nn.Linear(*WIDTHS, bias=False)
    return linear if make is None else make(linear)


def contestants(what: str, bfloat16: bool) -> dict[str, Callable[[], nn.Module]]:
    def compiled(make: Make | None) -> nn.Module:
        module = layer(what, make)
        module.compile()
        return module

    ours = BitLinear158.from_linear
    made: dict[str, Callable[[], nn.Module]] = {
        "dense float32": lambda: layer(what, None),
        "BitLinear158": lambda: layer(what, ours),
        "BitLinear158, bfloat16 input": lambda: layer(what, ours),
        "transformers AutoBitLinear": lambda: layer(what, auto_bit_linear),
        "dense float32, compiled": lambda: compiled(None),
        "BitLinear158, compiled": lambda: compiled(ours),
    }
    if bfloat16:
        made["dense bfloat16"] = lambda: layer(what, None).bfloat16()
    if importlib.util.find_spec("bitlinear") is not None:
        made["PyPI bitlinear"] = lambda: layer(what, pypi_bitlinear)
    else:
        print("PyPI bitlinear is not installed, so it is not compared")
    return made


def inputs(what: str, tokens: int, name: str) -> tuple[Tensor, Tensor]:
    width, out = (BLOCK.hidden_size, BLOCK.hidden_size) if what == "block" else WIDTHS
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    return torch.randn(1, tokens, width, dtype=dtype, requires_grad=True), torch.randn(1, tokens, out, dtype=dtype)


def step(module: nn.Module, x: Tensor, gradient: Tensor) -> float:
    module.zero_grad()
    x.grad = None
    began = time.perf_counter()
    module(x).backward(gradient)
    return time.perf_counter() - began


def status(field: str) -> float:
    """A field of /proc/self/status in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1e3 for line in file if line.startswith(field))


def peak_memory(what: str, tokens: int, name: str) -> float:
    module = contestants(what, bfloat16=True)[name]()
    x, gradient = inputs(what, tokens, name)
    step(module, x, gradient)
    module.zero_grad()
    x.grad = None
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    step(module, x, gradient)
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("linear", "block"), default="linear")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bfloat16", action="store_true", help="time a dense bfloat16 layer too")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print(peak_memory(arguments.what, arguments.tokens, arguments.peak_of))
        return
    modules = {name: make() for name, make in contestants(arguments.what, arguments.bfloat16).items()}
    data = {name: inputs(arguments.what, arguments.tokens, name) for name in modules}
    times: dict[str, list[float]] = {name: [] for name in modules}
    for number in range(arguments.rounds + 1):
        for name, module in modules.items():
            seconds = step(module, *data[name])
            if number:  # the first round warms up and compiles
                times[name].append(seconds)
    modules.clear()
    base = statistics.median(times["dense float32"])
    print(f"{arguments.what}, {arguments.tokens} tokens, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{'':28}{'median s':>10}{'min-max':>16}{'ratio':>8}{'peak MB':>10}")
    for name, seconds in times.items():
        command = [sys.executable, __file__, "--what", arguments.what, "--tokens", str(arguments.tokens)]
        command += ["--threads", str(arguments.threads), "--peak-of", name]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        median, spread = statistics.median(seconds), f"{min(seconds):.3f}-{max(seconds):.3f}"
        print(f"{name:28}{median:10.3f}{spread:>16}{median / base:8.2f}{peak:10.0f}")


if __name__ == "__main__":
    main()
