"""What an export takes: seconds, memory above the model, bytes on disk, and how fast the result loads.

    python benchmarks/export.py [--size 125m] [--vocabulary 32000] [--threads 1]

One b1.58 model of random weights, Llama's body, written in every format it fits, each in a process of its own: peak
resident memory is of the process, and the model's own is taken off. Loading is compared with the dense twin's
safetensors folder through transformers, in the same run; the medians of 3.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from bitnet.export import exporter, load
from bitnet.export.parity import size_of
from bitnet.models import Size, from_scratch
from bitnet.nn import convert

TARGETS = [
    ("packed", {"layout": "i2"}),
    ("packed", {"layout": "t5"}),
    ("packed", {"layout": "i2", "rest": "int8"}),
    ("gguf", {"type": "TQ2_0"}),
    ("gguf", {"type": "TQ1_0"}),
    ("hf", {"weights": "bitlinear"}),
    ("hf", {"weights": "autobitlinear"}),
    ("hf", {"weights": "latent"}),
]


def write(target, size, vocabulary, path, threads):
    """Seconds, MiB above the model at the peak, and the largest layer's MiB."""
    torch.set_num_threads(threads)
    model = _model(size, vocabulary)
    before = _peak()
    began = time.perf_counter()
    name, options = target
    done = exporter(name, **options).write(model, None, path)
    return time.perf_counter() - began, _peak() - before, done.difference, done.runtime_difference


def read(path, dense, threads):
    """Seconds to load, and to answer the first token after it."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    if dense:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path)
    else:
        model = load(path).model
    loaded = time.perf_counter() - began
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1]]))
    return loaded, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="125m", help="a file of conf/size")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="how often each folder is loaded")
    options = parser.parse_args()
    shape = yaml.safe_load((Path(__file__).parents[1] / "conf" / "size" / f"{options.size}.yaml").read_text())
    shape.pop("_target_")
    largest = max(shape["hidden_size"] * shape["intermediate_size"], shape["hidden_size"] * options.vocabulary) * 4
    fresh = multiprocessing.get_context("spawn")
    table = Table(
        "format", "write s", "peak MiB above", "MB", "load s", "of dense", "first token s", "logits", "runtime"
    )
    with tempfile.TemporaryDirectory() as folder, fresh.Pool(1, maxtasksperchild=1) as pool:
        pool.apply(_write_dense, (shape, options.vocabulary, f"{folder}/dense"))
        dense = _load(pool, f"{folder}/dense", True, options)
        table.add_row(
            "dense float32", "", "", f"{size_of(Path(folder) / 'dense') / 1e6:.1f}", f"{dense[0]:.2f}", "1.00",
            f"{dense[1]:.2f}", "", "",
        )  # fmt: skip
        for number, target in enumerate(TARGETS):
            path = f"{folder}/{number}{'.gguf' if target[0] == 'gguf' else ''}"
            arguments = (target, shape, options.vocabulary, path, options.threads)
            seconds, memory, difference, runtime = pool.apply(write, arguments)
            loaded = _load(pool, path, False, options)
            table.add_row(
                f"{target[0]} {' '.join(target[1].values())}", f"{seconds:.1f}", f"{memory:.0f}",
                f"{size_of(Path(path)) / 1e6:.1f}", f"{loaded[0]:.2f}", f"{loaded[0] / dense[0]:.2f}",
                f"{loaded[1]:.2f}", f"{difference:.1e}", "" if runtime is None else f"{runtime:.1e}",
            )  # fmt: skip
    console = Console(width=140)
    console.print(table)
    console.print(f"largest layer in float32: {largest / 2**20:.0f} MiB")


def _load(pool, path, dense, options):
    timed = [pool.apply(read, (path, dense, options.threads)) for _ in range(options.rounds)]
    return [statistics.median(each[place] for each in timed) for place in (0, 1)]


def _write_dense(size, vocabulary, path):
    from_scratch(body="llama", size=Size(**size), vocab_size=vocabulary, hidden_act="silu").save_pretrained(path)


def _model(size, vocabulary):
    model = from_scratch(body="llama", size=Size(**size), vocab_size=vocabulary, hidden_act="silu")
    convert(model)
    return model.eval()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
