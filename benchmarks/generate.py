"""How many tokens a second does each form of one model write, and where does the time go?

    python benchmarks/generate.py                                  # the 125M shape with random weights, all forms
    python benchmarks/generate.py --forms bfloat16/packed --threads 2 --tokens 128

Forms: float32 and bfloat16 (dense twins), frozen (codes of a byte), packed (2 bits a weight). Each writes at a
temperature of 0.7 after the same random prompt, by this package's step for one token and by transformers' forward pass;
forms take turns; printed are medians of all steps of all turns, and the quickest. "outside" is the share of a step that
is not the model: the draw and the text of the token. "x bf16": against bfloat16 by this package's own step.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitnet.generation import CachedModel, Sampling, stream
from bitnet.models import Size, from_scratch
from bitnet.nn import convert, freeze, pack
from bitnet.nn.digits import round_head
from bitnet.ops import choice

SIZES = Path(__file__).parents[1] / "conf" / "size"


@dataclass
class Timed:
    """A model, and seconds of its texts: to the first token, of each later token, and of the model within these."""

    model: PreTrainedModel
    own_step: bool
    clock: Callable[[], float] = time.perf_counter
    first: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    within: list[float] = field(default_factory=list)

    def write(self, tokenizer: PreTrainedTokenizerFast, prompt: list[int], tokens: int) -> None:
        cached = CachedModel(self.model)
        if not self.own_step:
            cached._step = None
        read, times = cached.read, list[float]()

        def timed(ids: Sequence[int]) -> Tensor:
            began = self.clock()
            try:
                return read(ids)
            finally:
                times.append(self.clock() - began)

        cached.read = timed
        sampling = Sampling(max_new_tokens=tokens)
        last = self.clock()
        for number, _ in enumerate(stream(self.model, tokenizer, prompt, sampling, cached=cached)):
            now = self.clock()
            (self.steps if number else self.first).append(now - last)
            last = now
        self.within += times[1:]


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """A vocabulary of words, each of which is a text of its own."""
    from tokenizers import Tokenizer, decoders, models

    raw = Tokenizer(models.BPE(vocab={f"w{each}Ġ": each for each in range(vocabulary)}, merges=[]))
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def forms_of(body: str, size: Size, vocabulary: int) -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    act = "relu2" if body == "bitnet" else "silu"
    dense = from_scratch(body=body, size=size, vocab_size=vocabulary, hidden_act=act).eval()
    forms = {"float32": dense, "bfloat16": copy.deepcopy(dense).bfloat16(), "frozen": copy.deepcopy(dense)}
    convert(forms["frozen"])
    freeze(forms["frozen"])
    forms["packed"] = copy.deepcopy(forms["frozen"])
    pack(forms["packed"])
    forms["packed, bfloat16 rest"] = copy.deepcopy(forms["packed"]).bfloat16()
    forms["packed, int8 head"] = copy.deepcopy(forms["packed"])
    round_head(forms["packed, int8 head"])
    return forms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="125m", help="a file of conf/size")
    parser.add_argument("--body", default="bitnet", choices=["bitnet", "llama"])
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="to write, in each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forms", help="separated by /; default: all")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for one thread on a busy machine"
    )
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    torch.set_num_threads(arguments.threads)
    shape = yaml.safe_load((SIZES / f"{arguments.size}.yaml").read_text())
    shape.pop("_target_")
    models = forms_of(arguments.body, Size(**shape), arguments.vocabulary)
    chosen = list(models) if arguments.forms is None else arguments.forms.split("/")
    timed = {
        f"{name}{'' if own else ', transformers'}": Timed(models[name], own, clock)
        for name in chosen
        for own in (True, False)
    }
    tokenizer = tokenizer_of(arguments.vocabulary)
    prompt = torch.randint(arguments.vocabulary, (arguments.prompt,)).tolist()
    for _ in range(arguments.turns):
        for each in timed.values():
            each.write(tokenizer, prompt, arguments.tokens)
    show(timed, arguments)


def show(timed: dict[str, Timed], arguments: argparse.Namespace) -> None:
    median = statistics.median
    print(
        f"{arguments.body} {arguments.size}, vocabulary {arguments.vocabulary}, {arguments.threads} threads,", end=" "
    )
    print(f"prompt {arguments.prompt}; packed layers run on {choice().name}")
    print(f"{'form':36} {'prompt tok/s':>12} {'tok/s':>8} {'ms/token':>9} {'quickest':>9} {'outside':>8} {'x bf16':>7}")
    rival = timed.get("bfloat16")
    for name, each in timed.items():
        step = median(each.steps)
        ratio = f"{median(rival.steps) / step:7.2f}" if rival else ""
        outside = 1 - median(each.within) / step
        print(
            f"{name:36} {arguments.prompt / median(each.first):12.1f} {1 / step:8.1f} {step * 1e3:9.2f} "
            f"{min(each.steps) * 1e3:9.2f} {outside:8.1%} {ratio}"
        )


if __name__ == "__main__":
    main()
