"""BiLLM: where the bits go, how long a layer takes, and what is left of a model.

    python benchmarks/billm.py --what bits                   # bits a weight of every part, from the tensors themselves
    python benchmarks/billm.py --what speed                  # one 2048 x 2048 layer, beside the published algorithm
    python benchmarks/billm.py --what operations             # of the default on a Llama of 7B
    python benchmarks/billm.py --what model --model DIR --data DIR [--only NAME ...] [--json FILE]
    python benchmarks/billm.py --what report --json FILE [--plot FILE]     # the table and the picture of all records

`model` follows the protocol of most published figures: 128 calibration windows of 256 tokens at random places of 400
training documents, perplexity of the joined validation text in windows of 256. DIR of the data has C4's layout. The
published code calibrates a whole block at once; here every variant is calibrated stage by stage (true-sequential),
but for `official`, which keeps to the code. Records are appended to FILE, one json a line; of two of one name
the later one's figures count.
"""

import argparse
import gzip
import json
import math
import runpy
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.nn import QuantizedLinear
from bitnet.ptq import ARBLLM, GPTQ, PBLLM, BiLLM, Driver, LayerStats, PTQMethod, quantize
from bitnet.ptq.billm import PlaneWeight

WEIGHTS: dict[str, Any] = {"search": "weights"}
OURS: dict[str, Any] = {"damping": 0.1, "correction": 0.5}
FULL = "full precision"
METHODS: dict[str, PTQMethod | None] = {
    FULL: None,
    "ours 1.1": BiLLM(bits=1.1, **OURS),
    "ours 1.5": BiLLM(bits=1.5, **OURS),
    "ours 2.0": BiLLM(bits=2.0, **OURS),
    "ours 2.25": BiLLM(bits=2.25, **OURS),
    "ours 3.0": BiLLM(bits=3.0, **OURS),
    "official, on saliency": BiLLM(variant="official"),
    "official, on weights": BiLLM(variant="official", quirks=WEIGHTS),
    "paper": BiLLM(variant="paper"),
    "refined": BiLLM(variant="refined", **OURS),
    "ARB-LLM RC": ARBLLM(),
    "PB-LLM, 10 %": PBLLM(share=0.1),
    "PB-LLM, 5 %": PBLLM(share=0.05),
    "GPTQ 2 bit": GPTQ(bits=2),
    "GPTQ 3 bit": GPTQ(bits=3),
    "GPTQ refined 2 bit": GPTQ(bits=2, range="mse", correction=0.5, sweeps=4),
}
LLAMA_7B = (((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)) * 32


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
            method = BiLLM(variant=method.variant, bits=method.bits, quirks=method.quirks)  # without correction
        if isinstance(method, BiLLM | ARBLLM | PBLLM):
            result = method.quantize(weight, stats)
            parts = ", ".join(f"{part} {share:.3f}" for part, share in result.parts.items() if share)
            claim = getattr(result, "claimed_bits", method.claimed_bits)
            print(f"{name:22} {result.bits_per_weight:.3f} (claims {claim:.2f}) = {parts}", flush=True)
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
    plain = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "ptq" / "test_billm.py"))["reference"]
    upper = stats.inverse_factor(0.01).upper
    begin, cpu = time.perf_counter(), time.process_time()
    plain(weight, upper, 128, True)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    print(f"{'published, plain loop':22} {wall:.2f} s ({cpu:.2f} s of the processor)", flush=True)


def operations(sweeps: int = 4) -> None:
    """Print what `ours` does on a Llama of 7B: a product with a triangle, two with H, and one with H a sweep."""
    flops = sum(2 * rows * columns**2 * (2.5 + sweeps) for rows, columns in LLAMA_7B)
    steps = sum(columns * (1 + sweeps) for _, columns in LLAMA_7B)
    print(f"{flops:.2g} operations, nearly all in matrix products: {flops / 1e13:.0f} s at 10 TFLOP/s")
    print(f"{steps:,} column steps of about ten launches: {steps * 10 * 5e-6:.0f} s at 5 microseconds a launch")


def model(path: Path, data: Path, only: list[str], record: Path | None, *, evaluate: bool) -> None:
    """Quantize and measure the model once for each method; without perplexity where it is not to be evaluated."""
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
        row = {"name": name, **quantized(network, name, calibration)}
        if evaluate:
            row["perplexity"] = perplexity(network, text)
        print(json.dumps(row), flush=True)
        if record is not None:
            with record.open("a") as file:
                file.write(json.dumps(row) + "\n")


def quantized(network: torch.nn.Module, name: str, calibration: Tensor) -> dict[str, Any]:
    """Quantize in place; what it took and gave. Seconds are of the processor, calibration included."""
    method = METHODS[name]
    if method is None:
        return {"claimed_bits": 32, "bits_per_weight": 32, "bytes": 0, "relative_error": 0.0, "cpu_seconds": 0.0}
    driver = Driver(batch_size=16, true_sequential=not name.startswith("official"), layer_errors=True)
    begin, cpu = time.perf_counter(), time.process_time()
    layers = quantize(network, method, calibration, driver=driver)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    weights = sum(math.prod(each.shape) for each in layers)
    stored = sum(each.bits_per_weight * math.prod(each.shape) for each in layers)
    results = [each.weight for each in network.modules() if isinstance(each, QuantizedLinear)]
    claims = [getattr(each, "claimed_bits", method.claimed_bits) * math.prod(each.shape) for each in results]
    return {
        "claimed_bits": sum(claims) / weights,
        "bits_per_weight": stored / weights,
        "bytes": round(stored / 8),
        "relative_error": sum(each.relative_error or 0.0 for each in layers) / len(layers),
        "cpu_seconds": cpu,
        "seconds": wall,
        "seconds_in_method": sum(each.seconds for each in layers),
    }


def report(record: Path, plot: Path | None) -> None:
    """Print the table of all records in Markdown, and draw them."""
    rows: dict[str, dict[str, Any]] = {}
    for row in map(json.loads, record.read_text().splitlines()):
        rows[row["name"]] = rows.get(row["name"], {}) | row
    full = rows.pop(FULL)
    print(f"full precision: perplexity {full['perplexity']:.4f}\n")
    print("| method | claimed bits | true bits | MB | perplexity | gap, nats | error | CPU seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for row in sorted(rows.values(), key=lambda row: (not row["name"].startswith("ours"), row["bits_per_weight"])):
        gap = math.log(row["perplexity"] / full["perplexity"])
        seconds = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
        print(
            f"| {row['name']} | {row['claimed_bits']:.3g} | {row['bits_per_weight']:.2f} | {row['bytes'] / 1e6:.2f} "
            f"| {row['perplexity']:.2f} | {gap:.3f} | {row['relative_error']:.4f} | {seconds} |"
        )
    if plot is not None:
        from bitnet.report import pareto

        title = "BiLLM's variants, ours, and others beside them: Llama of 6.8M parameters"
        pareto([run_record(row) for row in (full, *rows.values())], plot, title=title)


def run_record(row: dict[str, Any]) -> Any:
    """The row as `bitnet.report` takes it."""
    from bitnet.report import RunRecord

    return RunRecord(
        method=row["name"],
        model="llama",
        data={},
        evaluation={"text": "c4 validation", "window": 256},
        bits_per_weight=row["bits_per_weight"],
        bytes=row["bytes"],
        nll=math.log(row["perplexity"]),
        perplexity=row["perplexity"],
        claimed_bits=row["claimed_bits"],
        bits_per_byte=None,
        tokens_per_s=None,
        train_tokens=0,
        steps=0,
        seed=0,
        git_sha=None,
        git_dirty=None,
        command=" ".join(sys.argv),
        config={},
        versions={},
        machine={},
        started=datetime.now(UTC).isoformat(),
        seconds=0.0,
    )


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
    parser.add_argument("--what", choices=["bits", "speed", "operations", "model", "report"], default="bits")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--columns", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", nargs="*", default=[], choices=list(METHODS))
    parser.add_argument("--seconds-only", action="store_true", help="no perplexity: the row joins the one in --json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "model":
        if arguments.model is None or arguments.data is None:
            parser.error("--what model needs --model and --data")
        model(arguments.model, arguments.data, arguments.only, arguments.json, evaluate=not arguments.seconds_only)
    elif arguments.what == "report":
        if arguments.json is None:
            parser.error("--what report needs --json")
        report(arguments.json, arguments.plot)
    elif arguments.what == "operations":
        operations()
    elif arguments.what == "bits":
        bits(arguments.rows or 512, arguments.columns or 512)
    else:
        speed(arguments.rows or 2048, arguments.columns or 2048)


if __name__ == "__main__":
    main()
