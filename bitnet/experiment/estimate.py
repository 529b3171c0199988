"""What a run would cost, without running it: parameters and bytes are counted, memory and time are estimated."""

import time
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from bitnet.data.tokenizer import TokenizerSpec, read_tokenizer
from bitnet.experiment.settings import build, build_model
from bitnet.export.doctor import TARGETS, diagnose
from bitnet.files import readable_bytes
from bitnet.models import diagnose_conversion
from bitnet.nn import BitLinear, bit_linears, merge_lora
from bitnet.nn.linears import weight_of
from bitnet.ptq import PTQMethod, Statistic
from bitnet.ptq.blocks import find_blocks, linears_of

NOT_CODES = {"dequantized", "auto"}  # options of formats that hold values where there are codes, or choose themselves
BYTES_OF_LIBRARIES = 600_000_000  # resident in a run of this package before it has a model (docs/lab-notes.md)
BYTES_OF_A_WEIGHT_AND_GRADIENT = 8  # float32
BYTES_OF_AVERAGES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0}  # a parameter; rows and columns are not counted


def print_estimate(cfg: DictConfig, console: Console) -> None:
    """Print the table of a dry run. The model takes no memory (meta device) unless it comes from a folder."""
    model = _model(cfg)
    figures = _of_training(model, cfg) if cfg.fit or not cfg.ptq else {}
    if cfg.get("lora"):
        figures |= _of_adapters(model, cfg)
    if cfg.ptq:
        figures |= _of_quantization(model, cfg)
    _print_table(console, f"Dry run of {cfg.method}", figures)
    if bit_linears(model):
        report = diagnose_conversion(model, exclude=cfg.model.exclude)
        _print_table(console, "Conversion", report.rows() | _of_exports(model))


def memory_of_a_run(cfg: DictConfig) -> int:
    """Estimated bytes that training ``cfg`` takes on a CPU: the model and its optimizer, activations, the libraries.

    A second copy of the weights is counted as well: a teacher, an original to compare with, or the frozen model.
    """
    model = _model(cfg)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = cfg.data.batch_size * cfg.data.block_size
    logits = 3 * 4 * tokens * model.get_output_embeddings().weight.shape[0]  # float32: they, their softmax and gradient
    weights = (_bytes_a_trained_parameter(cfg) + 4) * parameters
    return BYTES_OF_LIBRARIES + weights + _activation_bytes(model, tokens, cfg) + logits


def _model(cfg: DictConfig) -> Any:
    tokenizer: TokenizerSpec = build(cfg.data.tokenizer)
    vocab_size = tokenizer.vocab_size if tokenizer.path is None else len(read_tokenizer(tokenizer.path))
    if cfg.model.path is not None:
        norms = {"calibration": torch.zeros(1, 2, dtype=torch.int64)} if cfg.model.get("subln") else {}
        return build_model(cfg, vocab_size=cfg.model.vocab_size or 1, **norms)  # the folder knows its vocabulary
    with torch.device("meta"):
        return build_model(cfg, vocab_size=cfg.model.vocab_size or vocab_size)


def _print_table(console: Console, title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def _of_exports(model: nn.Module) -> dict[str, str]:
    """Which formats will hold every code as it was trained, and why the others will not."""
    targets = [target for target in TARGETS if not set(target[1].values()) & NOT_CODES]
    found = diagnose(model, targets=targets)
    return {
        "exports that keep every code": "\n".join(each.command for each in found if not each.problems),
        "exports that do not fit": "\n".join(
            f"{each.command}: {'; '.join(each.problems)}" for each in found if each.problems
        ),
    }


def _of_training(model: nn.Module, cfg: DictConfig) -> dict[str, str]:
    tokens = cfg.data.batch_size * cfg.data.block_size
    parameters = sum(p.numel() for p in model.parameters())
    quantized = sum(layer.weight.numel() for _, layer in bit_linears(model))
    weights = [(layer.quantized_weight(), layer.weight.numel()) for _, layer in bit_linears(model)]
    frozen = 4 * (parameters - quantized) + sum(q.bits_per_weight * count / 8 for q, count in weights)
    flops = 6 * (parameters - model.get_input_embeddings().weight.numel()) * tokens  # pyright: ignore
    flops *= cfg.trainer.accumulate_grad_batches
    activations = _activation_bytes(model, tokens, cfg)
    rate = _matmul_rate()
    seconds = flops * cfg.trainer.max_steps / rate
    return {
        "parameters": f"{parameters:,}, of which {quantized:,} quantized ({quantized / parameters:.0%})",
        "checkpoint, latent float32": readable_bytes(4 * parameters),
        "frozen: packed codes, float32 scales and the rest": readable_bytes(frozen),
        "training memory: weights, gradients, optimizer": readable_bytes(_bytes_a_trained_parameter(cfg) * parameters),
        "training memory: activations (estimate)": readable_bytes(activations),
        **({"teacher": "its weights and its logits come on top"} if cfg.get("distill") else {}),
        "tokens": f"{tokens * cfg.trainer.accumulate_grad_batches:,} a step, {cfg.trainer.max_steps:,} steps",
        "time (estimate)": f"{_duration(seconds)} at the {rate / 1e9:,.0f} GFLOP/s that a float32 product reaches here",
    }


def _of_adapters(model: nn.Module, cfg: DictConfig) -> dict[str, str]:
    """What is trained of a model with adapters; it has none in the end."""
    parameters = sum(p.numel() for p in model.parameters())
    build(cfg.lora)(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    merge_lora(model)
    transient = max(4 * layer.weight.numel() for _, layer in bit_linears(model))  # gradient of one merged weight
    memory = 4 * parameters + _bytes_a_trained_parameter(cfg) * trained + transient
    return {
        "trained": f"{trained:,} parameters ({trained / parameters:.1%}) with adapters of rank {cfg.lora.rank}",
        "training memory: weights, gradients, optimizer": readable_bytes(memory),
    }


def _of_quantization(model: nn.Module, cfg: DictConfig) -> dict[str, str]:
    """Counted from the shapes of the linears in the blocks: what calibration and an error-compensating method take."""
    method: PTQMethod = build(cfg.ptq)
    _, blocks = find_blocks(model)
    shapes = [[tuple(weight_of(layer).shape) for layer in linears_of(block).values()] for block in blocks]
    quantized = sum(out * columns for block in shapes for out, columns in block)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = cfg.calibration.windows * (cfg.calibration.window or cfg.data.block_size)
    widest = max(columns for block in shapes for _, columns in block)
    block_bytes = max(4 * sum(out * columns for out, columns in block) for block in shapes)
    hidden = 2 * 4 * tokens * min(columns for block in shapes for _, columns in block)  # a block's inputs and outputs
    stages = sum(len({columns for _, columns in block}) + 2 for block in shapes)  # q, k, v; o; gate, up; down
    flops = 2 * tokens * (4 * quantized + stages * widest**2)  # forward passes stage by stage, and their Hessians
    if Statistic.HESSIAN in method.requires:
        flops += sum(2 * columns**2 * (out + columns) for block in shapes for out, columns in block)
    rate = _matmul_rate()
    return {
        "parameters": f"{parameters:,}, of which {quantized:,} quantized ({quantized / parameters:.0%})",
        "quantized linears at the bits that the method goes by": readable_bytes(quantized * method.claimed_bits / 8),
        "calibration": f"{tokens:,} tokens; hidden states {readable_bytes(hidden)}",
        "memory: model (twice with evaluation.compare), block, Hessian, factor, a copy": readable_bytes(
            (8 if cfg.evaluation.get("compare") else 4) * parameters + block_bytes + 12 * widest**2
        ),
        "time (rough estimate)": f"{_duration(flops / rate)} at {rate / 1e9:,.0f} GFLOP/s, the evaluation not counted",
    }


def _bytes_a_trained_parameter(cfg: DictConfig) -> int:
    """Of an optimizer that is not one of ours, as of AdamW."""
    return BYTES_OF_A_WEIGHT_AND_GRADIENT + BYTES_OF_AVERAGES.get(cfg.optim._target_.rsplit(".", 1)[-1].lower(), 8)


def _activation_bytes(model: nn.Module, tokens: int, cfg: DictConfig) -> int:
    """Kept for the backward pass: the inputs of every linear, int8 or float32, and two float32 copies of its output.

    With gradient checkpointing the float32 input of every block, and of one block the rest.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    kept = tokens * sum((1 if isinstance(m, BitLinear) else 4) * m.in_features + 8 * m.out_features for m in linears)
    if not cfg.model.get("gradient_checkpointing"):
        return kept
    config: Any = model.config
    return kept // config.num_hidden_layers + 4 * tokens * config.num_hidden_layers * config.hidden_size


def _matmul_rate(size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a float32 matrix product on this machine, measured for a moment."""
    a = torch.randn(size, size, device="cuda" if torch.cuda.is_available() else "cpu")
    a @ a
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize()
        count += 1
    return 2 * size**3 * count / elapsed


def _duration(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.0f} days"
    return f"{seconds / 3600:,.1f} hours" if seconds >= 2 * 3600 else f"{seconds / 60:,.1f} minutes"
