"""Text from any model that this package writes or reads: ``python -m bitnet.generate PATH "prompt"``.

In Python: ``stream(model, tokenizer, "prompt", Sampling(top_p=0.9))`` gives pieces of text, `complete` gives all of it.
"""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet import generation
from bitnet.errors import InputError
from bitnet.generation import Sampling

if TYPE_CHECKING:  # and within functions: the help page needs none of it
    from transformers import PreTrainedTokenizerBase

    from bitnet.export.reading import Loaded
    from bitnet.generation import CachedModel, Completion, Statistics, complete, stream

__all__ = ["Completion", "Sampling", "Statistics", "complete", "main", "stream"]

ENDED_BY = {"end": "end of text", "stop": "stop text", "length": "--max-new-tokens", "context": "the context is full"}


def __getattr__(name: str) -> Any:
    if name not in ("Completion", "Statistics", "complete", "stream"):
        raise AttributeError(f"module 'bitnet.generate' has no attribute {name!r}: it offers {', '.join(__all__)}")
    return getattr(generation, name)


def main(arguments: Sequence[str] | None = None, load: "Callable[[Path], Loaded] | None" = None) -> int:
    """The command line; returns the exit status: 0, 1 (refused), 130 (Ctrl-C), 141 (nobody reads the output)."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options, _load if load is None else load)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        _write_no_more()
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


@dataclass
class _Speaker:
    """A loaded model that answers on standard output and reports on standard error."""

    loaded: "Loaded"
    seconds: float
    sampling: Sampling
    options: argparse.Namespace
    cached: "CachedModel" = field(init=False)

    def __post_init__(self) -> None:
        self.cached = generation.CachedModel(self.loaded.model, graph=self.options.graph)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        if self.loaded.tokenizer is None:
            raise InputError(f"{self.loaded.path} has no tokenizer: export the model again with one")
        return self.loaded.tokenizer

    def answer(self, prompt: str | Sequence[int]) -> tuple[str, bool]:
        """Write what follows ``prompt``; return it, and whether Ctrl-C ended it."""
        pieces = generation.stream(self.loaded.model, self.tokenizer, prompt, self.sampling, cached=self.cached)
        text, interrupted = "", False
        try:
            for piece in pieces:
                text += piece
                if not self.options.json:
                    _write(piece)
        except KeyboardInterrupt:
            interrupted = True
        if self.options.json:
            _write(json.dumps({"text": text, **asdict(pieces.statistics)}, ensure_ascii=False) + "\n")
        else:
            _write("\n")
        if not self.options.quiet:
            print(self.report(pieces.statistics), file=sys.stderr)
        return text, interrupted

    def report(self, statistics: "Statistics") -> str:
        from bitnet.export.parity import size_of

        path, head = self.loaded.path, ", head rounded to int8" if self.options.head == "int8" else ""
        head += ", CUDA graph" if self.cached.graphed else ""
        read = statistics.prompt_tokens - statistics.reused_tokens
        return (
            f"[{self.loaded.format}{head}, {size_of(path) / 1e6:.1f} MB, loaded in {self.seconds:.2f} s | "
            f"prompt: {read} tokens, {statistics.prefill_tokens_per_second:.1f} tokens/s | "
            f"text: {statistics.new_tokens} tokens, {statistics.tokens_per_second:.1f} tokens/s, "
            f"ended by {ENDED_BY.get(statistics.finish, 'interruption')}]"
        )


def _run(options: argparse.Namespace, load: "Callable[[Path], Loaded]") -> int:
    sampling = Sampling(
        **{each: getattr(options, each) for each in Sampling.__dataclass_fields__ if each != "stop"},
        stop=tuple(options.stop),
    )
    if options.prompt is None and not options.chat:
        raise InputError('expected a prompt to continue: give "TEXT", - to read it from standard input, or --chat')
    if options.system is not None and not options.chat:
        raise InputError("--system is a part of a conversation: add --chat")
    prompt = _read_prompt(options.prompt)
    if options.threads is not None:
        _use_threads(options.threads)
    began = time.perf_counter()
    loaded = load(options.path)
    from bitnet.nn import PackedLinear
    from bitnet.nn.digits import DigitLinear, round_head
    from bitnet.ops import choice

    if options.head == "int8":
        round_head(loaded.model)
    if any(isinstance(each, PackedLinear | DigitLinear) for each in loaded.model.modules()):
        choice()  # compiles kernels where none are cached: a part of loading, not of the first token
    speaker = _Speaker(loaded, time.perf_counter() - began, sampling, options)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the text
    if options.chat:
        return _converse(speaker, prompt)
    assert prompt is not None
    return 130 if speaker.answer(prompt)[1] else 0


def _converse(speaker: _Speaker, prompt: str | None) -> int:
    """One answer to ``prompt``; without one, a conversation with standard input until it ends."""
    messages = [] if speaker.options.system is None else [{"role": "system", "content": speaker.options.system}]
    if prompt is not None:
        messages.append({"role": "user", "content": prompt})
        return 130 if speaker.answer(generation.chat_ids(speaker.tokenizer, messages))[1] else 0
    generation.chat_ids(speaker.tokenizer, [{"role": "user", "content": ""}])  # refuse before the first line is typed
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = _from_standard_input(sys.stdin.readline)
        if not line:
            return 0
        messages.append({"role": "user", "content": line.rstrip("\n")})
        text, _ = speaker.answer(
            generation.chat_ids(speaker.tokenizer, messages)
        )  # Ctrl-C ends an answer, not the conversation
        messages.append({"role": "assistant", "content": text})


def _write(text: str) -> None:
    """``text`` on standard output, at once."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, for one
        _write_no_more()
        raise InputError(f"standard output cannot be written to: {error}") from error


def _write_no_more() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the interpreter flushes it at exit


def _read_prompt(given: str | None) -> str | None:
    if given != "-":
        return given
    return _from_standard_input(sys.stdin.read).removesuffix("\n")  # the line's end that echo adds


def _from_standard_input(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not text in {sys.stdin.encoding}: {error}") from error


def _use_threads(number: int) -> None:
    import torch

    if number < 1:
        raise InputError(f"--threads must be at least 1, got {number}")
    torch.set_num_threads(number)


def _load(path: Path) -> "Loaded":
    from transformers.utils import logging

    from bitnet.export import load

    logging.disable_progress_bar()
    return load(path)


def _parser() -> argparse.ArgumentParser:
    defaults = Sampling()
    parser = argparse.ArgumentParser(
        prog="python -m bitnet.generate",
        description="Continue a text, or chat. Standard output is the text alone; figures go to standard error.",
        epilog="A temperature of 0 always takes the most likely token. The same seed gives the same text.",
    )
    add = parser.add_argument
    add("path", type=Path, help="a packed or Hugging Face folder, a .gguf file, or a run's folder")
    add(
        "prompt", nargs="?", help="text to continue, - for standard input; with --chat what to answer, or nothing: talk"
    )
    add("--chat", action="store_true", help="use the tokenizer's chat template")
    add("--system", metavar="TEXT", help="first message of the conversation, with --chat")
    for name, type, what in (
        ("max_new_tokens", int, "tokens to generate, at most"),
        ("temperature", float, "logits are divided by it; 0: the most likely token"),
        ("top_k", int, "draw from so many of the likeliest tokens; 0: all"),
        ("top_p", float, "draw from the likeliest tokens that have this probability together"),
        ("repetition_penalty", float, "makes tokens that occurred less likely; 1: off"),
        ("seed", int, "of the drawing"),
    ):
        default = getattr(defaults, name)
        add(f"--{name.replace('_', '-')}", type=type, default=default, metavar="N", help=f"{what} (default: {default})")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--head", choices=["stored", "int8"], default="stored", help="int8: round the output head: faster, lossy")
    add(
        "--graph",
        action=argparse.BooleanOptionalAction,
        help="replay a token's step from a CUDA graph (default: on a GPU, for a body that this package knows)",
    )
    add("--json", action="store_true", help="write one JSON object with the text and its figures instead of the text")
    add("--quiet", action="store_true", help="no figures on standard error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
