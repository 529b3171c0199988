"""Every format that a model fits, in every runtime that is installed: sizes, logits, and the text of one prompt.

    python benchmarks/parity.py runs/NAME [runs/OTHER ...] [--prompt "The function returns"] [--tokens 24]

Each row is one export of one model, read back: "ours" is the difference of this package's logits from the exported
model's, "runtime" that of the program's that the format is for (root mean squares, as shares of the logits' spread).
"text" counts greedy tokens equal to the exported model's until the first that differs: ours, then the runtime's.
llama.cpp takes part where llama-cpp-python is installed; its cache of keys and values is float32 here, as ours is.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from bitnet.export import diagnose, exporter, load
from bitnet.nn import PackedLinear

FLOAT32 = {"embeddings": "f32", "dense": "f32"}  # llama.cpp rounds the inputs of a 16-bit matrix to 16 bits, too


def packable(model):
    return any(isinstance(layer, PackedLinear) for layer in model.modules())


def greedy(answer, ids, count):
    """``count`` tokens, each the likeliest after what ``answer`` (ids -> logits of the last) is given."""
    found = list(ids)
    for _ in range(count):
        found.append(int(answer(found).argmax()))
    return found[len(ids) :]


def equal_until(one, other):
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


@torch.inference_mode()
def last_logits(model, ids):
    return model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]


def runtime_answer(path, name):
    """The program that the format is for, as a function of ids; None where it is not installed."""
    if name == "gguf":
        try:
            import llama_cpp
        except ImportError:
            return None
        model = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1)

        def answer(ids):
            model.reset()
            model.eval(ids)
            return torch.from_numpy(model.scores[len(ids) - 1].copy())

        return answer
    if name == "hf":
        from transformers import AutoModelForCausalLM

        from bitnet.export.hf_gate import quiet_transformers

        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(path)

        def answer(ids):
            with torch.compiler.set_stance("force_eager"):
                return last_logits(model, ids)

        return answer
    return None


def rows(path, prompt, count):
    loaded = load(path)
    ids = loaded.tokenizer(prompt)["input_ids"]
    expected = greedy(lambda ids: last_logits(loaded.model, ids), ids, count)
    yield loaded.tokenizer.decode(expected)
    for each in diagnose(loaded.model):
        if each.problems or (each.format == "gguf" and each.options["type"] == "auto" and packable(loaded.model)):
            continue  # auto is TQ2_0 for a ternary model, which has a row already
        options = {**each.options, **(FLOAT32 if each.format == "gguf" else {})}
        with tempfile.TemporaryDirectory() as folder:
            target = exporter(each.format, **options)
            output = Path(folder) / target.filename
            done = target.write(loaded.model, loaded.tokenizer, output, loaded.record)
            again = load(output).model
            mine = equal_until(expected, greedy(lambda ids, model=again: last_logits(model, ids), ids, count))
            answer = runtime_answer(output, each.format) if done.runtime is not None else None
            its = "" if answer is None else f"{equal_until(expected, greedy(answer, ids, count))}"
            yield (
                done.format, f"{done.bytes:,}", f"{done.difference:.1e}", done.runtime or "",
                "" if done.runtime_difference is None else f"{done.runtime_difference:.1e}", f"{mine}", its,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--prompt", default="The function returns")
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    console = Console(width=140)
    for path in options.paths:
        found = rows(path, options.prompt, options.tokens)
        console.print(f"{path}: {options.prompt!r} goes on {next(found)!r}")
        table = Table("format", "bytes", "ours", "runtime", "its logits", f"text of {options.tokens}", "its text")
        for row in found:
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
