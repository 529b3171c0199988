"""What a converted model is worth before its first step of training, for each initialisation and quantizer.

    python benchmarks/init.py MODEL TEXT                       # the Hugging Face folder; C4's shards (*.json.gz)
    python benchmarks/init.py MODEL TEXT --quantizers absmean --inits none,hessian --windows 128

Printed are the mean loss of the dense model and of each converted one in nats a token, with inputs in 8 bits, on the
beginning of the validation text (documents joined by a blank line, windows of 256 tokens, the first of each not
predicted), and the CPU seconds of the initialisation, collection of statistics included. Calibration: windows at random
places of the first 400 training documents that are long enough.
"""

import argparse
import copy
import gzip
import json
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from bitnet.data.tokenizer import read_tokenizer
from bitnet.models import from_directory
from bitnet.nn import BitLinear158, convert
from bitnet.ptq import BiLLM, Compensated, FromMethod, LeastSquares, initialise
from bitnet.quant import LSQ, SEQ, Grid, absmean_ternary, centred_sign

WINDOW = 256
QUANTIZERS = {  # as conf/quantizer has them
    "absmean": absmean_ternary,
    "sign": centred_sign,
    "seq": SEQ(2),
    "lsq": LSQ(2),
    "int4": Grid(4, True, 128),
}
INITS = {  # as conf/init has them
    "none": None,
    "mse": LeastSquares(),
    "gptq": Compensated(),
    "hessian": Compensated(sweeps=4),
    "corrected": Compensated(sweeps=4, correction=0.5),
    "billm": FromMethod(method=BiLLM(bits=2.25)),
}


def documents(folder, pattern):
    shard = min(Path(folder).rglob(pattern))
    with gzip.open(shard, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def calibration(tokenizer, texts, windows):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts[:400]]
    tokens = [each for each in tokens if len(each) > WINDOW]

    def window():
        chosen = tokens[int(torch.randint(len(tokens), (1,), generator=generator))]
        start = int(torch.randint(len(chosen) - WINDOW, (1,), generator=generator))
        return chosen[start : start + WINDOW]

    return torch.stack([window() for _ in range(windows)])


@torch.inference_mode()
def loss(model, windows):
    model.eval()
    total = sum(
        functional.cross_entropy(
            model(batch, use_cache=False).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).double()
        for batch in windows.split(16)
    )
    return float(total) / windows[:, 1:].numel()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--quantizers", default=",".join(QUANTIZERS))
    parser.add_argument("--inits", default=",".join(name for name in INITS if name != "billm"))
    parser.add_argument("--windows", type=int, default=64, help="of calibration text")
    parser.add_argument("--tokens", type=int, default=80 * WINDOW, help="of validation text")
    args = parser.parse_args()
    tokenizer = read_tokenizer(args.model)
    text = calibration(tokenizer, documents(args.text, "*train*.json.gz"), args.windows)
    joined = tokenizer("\n\n".join(documents(args.text, "*validation*.json.gz")))["input_ids"]
    validation = torch.tensor(joined[: args.tokens // WINDOW * WINDOW]).view(-1, WINDOW)
    dense = from_directory(args.model)
    print(f"dense {loss(dense, validation):.3f} on {validation[:, 1:].numel():,} tokens", flush=True)
    for quantizer in args.quantizers.split(","):
        for init in args.inits.split(","):
            model = copy.deepcopy(dense)
            convert(model, partial(BitLinear158.from_linear, quantizer=QUANTIZERS[quantizer]))
            began = time.process_time()
            if INITS[init] is not None:
                initialise(model, INITS[init], text)
            seconds = time.process_time() - began
            print(f"{quantizer:10}{init:10}{loss(model, validation):8.3f}{seconds:8.1f} CPU s", flush=True)


if __name__ == "__main__":
    main()
