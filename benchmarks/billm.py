"""BiLLM: where the bits go, how long a layer takes, and what is left of a model.

    python benchmarks/billm.py --what bits                   # bits a weight of every part, from the tensors themselves
    python benchmarks/billm.py --what speed                  # one 2048 x 2048 layer, beside the published algorithm
    python benchmarks/billm.py --what model --model DIR --data DIR [--only NAME ...] [--json FILE]

`model` follows the protocol of most published figures: 128 calibration windows of 256 tokens at random places of 400
training documents, perplexity of the joined validation text in windows of 256. DIR of the data has C4's layout. The
published code calibrates a whole block at once; here every variant is calibrated stage by stage (true-sequential),
but for `official`, which keeps to the code. Records are appended to FILE, one json a line.
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.nn import QuantizedLinear
from bitnet.ptq import GPTQ, Driver, LayerStats, PTQMethod, quantize
from bitnet.ptq.billm import BiLLM, BlockBinary, PlaneWeight

WEIGHTS: dict[str, Any] = {"search": "weights"}
OURS: dict[str, Any] = {"damping": 0.1, "correction": 0.5}
METHODS: dict[str, PTQMethod] = {
    "ours 1.1": BiLLM(bits=1.1, **OURS),
    "ours 1.5": BiLLM(bits=1.5, **OURS),
    "ours 2.0": BiLLM(bits=2.0, **OURS),
    "ours 2.25": BiLLM(bits=2.25, **OURS),
    "ours 3.0": BiLLM(bits=3.0, **OURS),
    "official, on saliency": BiLLM(variant="official"),
    "official, on weights": BiLLM(variant="official", quirks=WEIGHTS),
    "paper": BiLLM(variant="paper"),
    "refined": BiLLM(variant="refined", **OURS),
    "GPTQ 2 bit": GPTQ(bits=2),
    "GPTQ 3 bit": GPTQ(bits=3),
}


def layer(rows: int, columns: int) -> tuple[Tensor, LayerStats]:
    """A normal weight, and inputs whose sizes spread like those of a language model."""
    torch.manual_seed(0)
    x = torch.randn(2 * columns, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / columns**0.5)
    x *= torch.exp(torch.randn(columns))
    return torch.randn(rows, columns), LayerStats(n_tokens=len(x), hessian=x.t() @ x / len(x))


def bits(rows: int, columns: int) -> None:
    """Print a table of all parts, counted from the tensors that are stored."""
    weight, stats = layer(rows, columns)
    print(f"stored bits a weight of a {rows} x {columns} layer")
    for name, method in METHODS.items():
        if isinstance(method, BiLLM):
            result = BiLLM(variant=method.variant, bits=method.bits, quirks=method.quirks).quantize(weight, stats)
            parts = ", ".join(f"{part} {share:.3f}" for part, share in result.parts.items() if share)
            claim = f" (claims {result.claimed_bits:.2f})" if isinstance(result, BlockBinary) else ""
            print(f"{name:22} {result.bits_per_weight:.3f}{claim} = {parts}", flush=True)
            if isinstance(result, PlaneWeight):
                counts = torch.bincount(result.planes_per_column, minlength=6).tolist()
                print(f"{'':22} columns of 0, 1, 2 ... planes: {counts}")


def speed(rows: int, columns: int) -> None:
    """Print seconds of one layer: the factorization, which all share, and what comes after it."""
    weight, stats = layer(rows, columns)
    order = stats.hessian.diagonal().argsort(descending=True, stable=True)  # type: ignore[union-attr]
    begin = time.perf_counter()
    stats.inverse_factor(0.01, order, key="activation")
    print(f"factorization {time.perf_counter() - begin:.2f} s", flush=True)
    methods = {f"ours 2.25, {n} sweeps": BiLLM(sweeps=n) for n in (0, 1, 2, 4)}
    methods["official"] = BiLLM(variant="official")
    for name, method in methods.items():
        key = "activation" if method.variant == "ours" else ""
        stats.inverse_factor(0.01, order if key else None, key=key)
        begin, cpu = time.perf_counter(), time.process_time()
        method.quantize(weight, stats)
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        print(f"{name:22} {wall:.2f} s ({cpu:.2f} s of the processor)", flush=True)


def model(path: Path, data: Path, only: list[str], record: Path | None) -> None:
    """Quantize and measure the model once for each method."""
    from transformers import AutoTokenizer

    from bitnet.data.passages import random_windows
    from bitnet.models.pretrained import from_directory

    tokenizer = AutoTokenizer.from_pretrained(path)
    training, validation = (sorted(data.glob(f"**/c4-{split}*.json.gz"))[0] for split in ("train", "validation"))
    ids = [i for text in documents(training)[:400] for i in tokenizer(text + tokenizer.eos_token).input_ids]
    calibration = random_windows(torch.tensor(ids), 128, 256, seed=0)
    text = torch.tensor(tokenizer("\n\n".join(documents(validation))).input_ids)
    for name in only or METHODS:
        network = from_directory(path)
        begin = time.perf_counter()
        driver = Driver(batch_size=16, true_sequential=not name.startswith("official"), layer_errors=True)
        layers = quantize(network, METHODS[name], calibration, driver=driver)
        seconds = time.perf_counter() - begin
        weights = sum(math.prod(each.shape) for each in layers)
        stored = sum(each.bits_per_weight * math.prod(each.shape) for each in layers)
        errors = [each.relative_error or 0.0 for each in layers]
        row = {
            "name": name,
            "claimed_bits": METHODS[name].claimed_bits,
            "bits_per_weight": stored / weights,
            "bytes": round(stored / 8),
            "relative_error": sum(errors) / len(errors),
            "perplexity": perplexity(network, text),
            "seconds": seconds,
            "seconds_in_method": sum(each.seconds for each in layers),
        }
        print(json.dumps(row), flush=True)
        if record is not None:
            with record.open("a") as file:
                file.write(json.dumps(row) + "\n")


def documents(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line)["text"] for line in file]


@torch.no_grad()
def perplexity(network: torch.nn.Module, text: Tensor, window: int = 256) -> float:
    """Of windows without overlap; the values of a layer are read once, not in every batch."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                dense = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                dense.weight.data = child.weight.dequantize()
                setattr(module, name, dense)
    total, count = 0.0, 0
    whole = len(text) // window * window
    batches = [*text[:whole].view(-1, window).split(16), text[whole:][None]]
    for batch in (each for each in batches if each.shape[1] > 1):
        logits = network(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
        count += batch[:, 1:].numel()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["bits", "speed", "model"], default="bits")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--columns", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", nargs="*", default=[], choices=list(METHODS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "model":
        if arguments.model is None or arguments.data is None:
            parser.error("--what model needs --model and --data")
        model(arguments.model, arguments.data, arguments.only, arguments.json)
    elif arguments.what == "bits":
        bits(arguments.rows or 512, arguments.columns or 512)
    else:
        speed(arguments.rows or 2048, arguments.columns or 2048)


if __name__ == "__main__":
    main()
