"""What does a training step of a quantized model cost, beside one of plain fine-tuning?

    python benchmarks/qat_step.py                          # two blocks of the 125M model, 2 x 256 tokens, every variant
    python benchmarks/qat_step.py --layers 12 --vocabulary 32000       # all of it: 2 GB a variant
    python benchmarks/qat_step.py --only "b1.58" "lora, rank 16" --what memory

A step is forward, cross-entropy, backward and the optimizer. All variants are stepped in turn within one process, round
after round, so that a slow moment of the machine meets all of them; printed are the median, its ratio to the dense
model's, and the range of the ratios of single rounds. With one thread (the default) the time is the CPU time of the
process, which neighbours on a busy machine lengthen less than the time on the clock.

Peak memory is that of weights, gradients, optimizer states and activations together, in the second step, each variant
in a forked process of its own (Linux); beside it stand the bytes of the optimizer's states alone.
"""

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bitnet import BitLinear158
from bitnet.models import Size, causal_lm
from bitnet.nn import LatentLoRA, bit_linears
from bitnet.quant import LSQ, Grid
from bitnet.training import Distillation, LogitKL, adafactor, adamw, adamw8bit

MEGA = 1e6
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train the model; the default is b1.58 with all weights trained by AdamW."""

    layer: Callable[[nn.Linear], nn.Module] | None = BitLinear158.from_linear
    body: str = "llama"
    optimizer: Callable[..., Optimizer] = adamw
    checkpointing: bool = False
    rank: int = 0
    blend: float = 1.0
    teacher: bool = False


BITS = Variant()
VARIANTS = {
    "dense": replace(BITS, layer=None),
    "b1.58": BITS,
    "b1.58, norms before o and down": replace(BITS, body="bitnet"),
    "b1.58, half way in its warm-up": replace(BITS, blend=0.5),
    "b1.58, teacher's logits": replace(BITS, teacher=True),
    "int4, groups of 128": replace(
        BITS, layer=partial(BitLinear158.from_linear, quantizer=Grid(4, symmetric=True, granularity=128))
    ),
    "lsq, 4 bits": replace(BITS, layer=partial(BitLinear158.from_linear, quantizer=LSQ(4))),
    "lora, rank 16": replace(BITS, rank=16),
    "dense, checkpointing": replace(BITS, layer=None, checkpointing=True),
    "b1.58, checkpointing": replace(BITS, checkpointing=True),
    "b1.58, adamw8bit": replace(BITS, optimizer=adamw8bit),
    "b1.58, adafactor": replace(BITS, optimizer=adafactor),
    "lora, checkpointing": replace(BITS, rank=16, checkpointing=True),
}


class Training:
    """A model, its optimizer and a batch."""

    def __init__(self, variant: Variant, arguments: argparse.Namespace) -> None:
        size = Size(
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=arguments.layers,
            num_attention_heads=12,
            num_key_value_heads=12,
        )
        build = partial(causal_lm, vocab_size=arguments.vocabulary, size=size, hidden_act="silu")
        self.model = build(body=variant.body, layer=variant.layer, gradient_checkpointing=variant.checkpointing).train()
        if variant.rank:
            LatentLoRA(rank=variant.rank)(self.model)
        if variant.blend < 1:
            for _, each in bit_linears(self.model):
                each.blend(variant.blend, variant.blend)
        self.distillation = Distillation(build(body=variant.body), logits=LogitKL()) if variant.teacher else None
        self.optimizer = variant.optimizer(self.model, lr=1e-4, weight_decay=0.1)
        self.ids = torch.randint(0, arguments.vocabulary, (arguments.batch, arguments.block))

    def step(self) -> None:
        self.optimizer.zero_grad()
        logits: Tensor = self.model(input_ids=self.ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())
        if self.distillation is not None:
            terms = self.distillation.losses(
                logits, {"input_ids": self.ids}, torch.ones_like(self.ids, dtype=torch.bool)
            )
            loss = self.distillation.objective(loss, terms)
        loss.backward()
        self.optimizer.step()

    def state_bytes(self) -> int:
        """Of the optimizer, beside weights and gradients; tables that all states share count once."""
        tensors = [each for state in self.optimizer.state.values() for each in state.values()]
        return sum({each.data_ptr(): each.nbytes for each in tensors if isinstance(each, Tensor)}.values())


def status(field: str) -> float:
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def memory(variant: Variant, arguments: argparse.Namespace) -> tuple[float, float]:
    """Bytes at most in the second step, above those before the model was made, and those of the optimizer's states.

    Measured in a child.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back at once: tensors are weighed, not gaps
            before = status("VmRSS")
            training = Training(variant, arguments)
            training.step()
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts anew
            training.step()
            os.write(writing, f"{status('VmHWM') - before} {training.state_bytes()}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text:
        raise SystemExit("a measurement of memory failed, see above")
    peak, states = map(float, text.split())
    return peak, states


def times_of(chosen: dict[str, Variant], arguments: argparse.Namespace) -> dict[str, list[float]]:
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    trainings = {name: Training(variant, arguments) for name, variant in chosen.items()}
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for number in range(arguments.rounds + 1):
        for name, training in trainings.items():
            began = clock()
            training.step()
            if number:  # the first round warms up
                times[name].append(clock() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--what", nargs="+", choices=("time", "memory"), default=["time", "memory"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = {"dense": VARIANTS["dense"]} | {name: VARIANTS[name] for name in arguments.only}
    peaks, times = {}, {}
    if "memory" in arguments.what:  # first: a process that has run a backward pass is not forked
        peaks = {name: memory(variant, arguments) for name, variant in chosen.items()}
    if "time" in arguments.what:
        times = times_of(chosen, arguments)
    tokens = arguments.batch * arguments.block
    print(
        f"{arguments.layers} blocks of 768/2048, {tokens} tokens, {arguments.threads} threads, torch "
        f"{torch.__version__}"
    )
    print(f"{'':32}{'median s':>10}{'ratio':>8}{'min-max':>14}{'peak MB':>12}{'ratio':>8}{'states MB':>12}")
    for name in chosen:
        line = f"{name:32}"
        if times:
            ratios = [mine / base for mine, base in zip(times[name], times["dense"], strict=True)]
            median = statistics.median(times[name])
            line += f"{median:10.3f}{median / statistics.median(times['dense']):8.2f}"
            line += f"{min(ratios):8.2f}-{max(ratios):.2f}"
        if peaks:
            peak, states = peaks[name]
            line += (
                f"{'' if times else ' ' * 32}{peak / MEGA:12.0f}{peak / peaks['dense'][0]:8.2f}{states / MEGA:12.1f}"
            )
        print(line)


if __name__ == "__main__":
    main()
