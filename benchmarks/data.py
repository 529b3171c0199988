"""How fast text becomes training batches, and whether memory stays flat as the corpus grows.

    python benchmarks/data.py FOLDER [--consumption TOKENS_PER_S] [--batches N]

Reads C4 shards from FOLDER in one process with one thread: gunzip, JSON, shuffle, tokenize, pack, collate. Prints
tokens/s, the ratio to what a training consumes, and the peak memory after N batches and after 2 N. Peaks are of
processes of their own, so that neither the tokenizer's training nor the first measurement is in the second.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread: what a training on the other cores leaves over

from bitnet.data import C4, TokenizerSpec
from bitnet.data.datamodule import TextDataModule


def measure(folder: Path, cache: Path, batches: int) -> tuple[float, float]:
    """Tokens per second over ``batches`` batches, and the process's peak resident memory in MiB."""
    module = TextDataModule(C4(folder), TokenizerSpec(), block_size=256, batch_size=8, cache_dir=cache)
    module.setup()
    stream = iter(module.train_dataloader())
    next(stream)
    begin = time.perf_counter()
    tokens = sum(batch["input_ids"].numel() for batch in islice(stream, batches))
    seconds = time.perf_counter() - begin
    return tokens / seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of c4-train.*.json.gz and c4-validation.*.json.gz")
    parser.add_argument("--consumption", type=float, help="tokens/s that the training consumes")
    parser.add_argument("--batches", type=int, default=2500, help="batches of 8 x 256 tokens in the first measurement")
    options = parser.parse_args()
    fresh = multiprocessing.get_context("spawn")  # a forked process inherits the peak of its parent
    with tempfile.TemporaryDirectory() as cache, fresh.Pool(1, maxtasksperchild=1) as pool:
        pool.apply(measure, (options.folder, Path(cache), 1))  # trains the tokenizer
        for batches in (options.batches, 2 * options.batches):
            rate, peak = pool.apply(measure, (options.folder, Path(cache), batches))
            line = f"{batches * 8 * 256 / 1e6:6.1f} M tokens: {rate:9,.0f} tokens/s, peak memory {peak:5.0f} MiB"
            if options.consumption:
                line += f", {rate / options.consumption:.1f} times the consumption"
            print(line, flush=True)


if __name__ == "__main__":
    main()
