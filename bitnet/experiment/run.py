"""One run: build, fit, evaluate, freeze, evaluate, export, record.

Everything that another layer needs from a third one meets here and nowhere else: the tokenizer's vocabulary goes into
the model, the data's bytes a token into the validation, the measured loss into the record.
"""

import logging
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, Trainer
from omegaconf import DictConfig
from rich.console import Console
from torch import nn
from transformers.utils import logging as transformers_logging

from bitnet.data.datamodule import TextDataModule
from bitnet.data.tokenizer import check_vocabulary, read_tokenizer
from bitnet.errors import InputError
from bitnet.experiment.arm import (
    LATENT_RECORD,
    RECORD,
    REFERENCE_RECORD,
    Arm,
    Fit,
    Started,
    all_exported,
    refuse_exports,
)
from bitnet.experiment.cells import in_use, sweep_cell
from bitnet.experiment.estimate import print_estimate
from bitnet.experiment.initial import check_init, start_from
from bitnet.experiment.logs import open_loggers
from bitnet.experiment.measure import Measure
from bitnet.experiment.post_training import calibration_windows, quantize_afterwards
from bitnet.experiment.settings import (
    build,
    build_all,
    build_model,
    check,
    claim_directory,
    discard_if_unused,
    process_rank,
    resumed,
    twin_of,
)
from bitnet.files import atomic_file
from bitnet.models.pretrained import holds_latent_weights
from bitnet.nn import bit_linears, freeze, merge_lora
from bitnet.report import RunRecord, publish, results_markdown, results_table, terminal
from bitnet.report import training_curves as draw_curves
from bitnet.training import AtomicCheckpointIO, Distillation, LanguageModelingModule, QuantizationWarmup

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

LAST = Path("checkpoints") / "last.ckpt"  # in a run's folder: what it goes on from


def run(cfg: DictConfig) -> list[RunRecord]:
    """Run what ``cfg`` describes, print the table, and return its rows.

    The folder of the run holds ``config.yaml``, ``run.json`` (the record), ``results.md``, ``curves.png``,
    ``checkpoints/``, ``csv/`` and what ``export`` names (``packed/``, ``hf/``, ...); a dense twin has all of it in
    ``dense/``. With ``ptq`` it holds ``reference.json`` (the original's record) and ``layers.csv``, ``layers.md``,
    ``layers.png``.

    Raises:
        InputError: the configuration, the data or the model cannot be used, or the training diverged.
    """
    _quiet()
    if cfg.resume is not None:
        cfg = resumed(cfg)
    check(cfg)
    check_init(cfg)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    console = terminal()
    if cfg.dry_run:
        print_estimate(cfg, console)
        return []
    directory = Path(cfg.resume) if cfg.resume is not None else claim_directory(cfg)
    cell = sweep_cell() if process_rank() == 0 else None
    if cell is not None and _is_done(cfg, directory):
        console.print(f"[bold]{cfg.method}[/bold] in {directory}: finished before")
    else:
        console.print(f"[bold]{cfg.method}[/bold] in {directory}")
    if cfg.model.path is not None and holds_latent_weights(cfg.model.path):
        console.print(
            f"{cfg.model.path} holds latent weights of a 1.58-bit model: what results stand beside is these weights "
            "unquantized, which is no full-precision model"
        )
    try:
        with in_use(cell) if cell is not None else nullcontext():
            records = _run_arms(cfg, directory, console)
    except Exception:
        if cfg.resume is None:
            discard_if_unused(directory)
        raise
    if process_rank() != 0:
        return []
    with atomic_file(directory / "results.md") as partial:
        partial.write_text(results_markdown(records), encoding="utf-8")
    console.print(results_table(records, title=f"Results ({directory})", width=console.width))
    if cfg.fit:
        arms = {"dense": directory / "dense", cfg.method: directory} if cfg.twin else {cfg.method: directory}
        curves = {name: arm / "csv" for name, arm in arms.items() if _logged_a_loss(arm)}
        if curves:  # none where the run was too short to log a step
            draw_curves(curves, directory / "curves.png")
    return records


def _run_arms(cfg: DictConfig, directory: Path, console: Console) -> list[RunRecord]:
    if not cfg.twin:
        return _run_arm(cfg, directory)
    console.print("The dense twin first.")
    records = _run_arm(twin_of(cfg), directory / "dense")
    console.print(f"Now {cfg.method}.")
    return records + _run_arm(cfg, directory)


def _run_arm(cfg: DictConfig, directory: Path) -> list[RunRecord]:
    """One model from its first step to its record; one that has its record and its exports already is read back."""
    if _is_done(cfg, directory):
        names = (REFERENCE_RECORD, LATENT_RECORD, RECORD)
        found = [directory / name for name in names if (directory / name).exists()]
        return [RunRecord.read(path) for path in found]
    started = Started.now()
    torch.manual_seed(cfg.seed)
    data = _build_data(cfg)
    model = _build_model(cfg, data)
    if not cfg.ptq:  # what it quantizes to is not there yet
        refuse_exports(cfg, model, data)
    distillation = _distillation(cfg, data, model)  # a teacher is refused before the weights to start from are found
    start_from(cfg, directory / LAST, data, model)
    with open_loggers(cfg, directory) as loggers:
        fit = _fit(cfg, directory, data, model, loggers, distillation) if cfg.fit else Fit(0, 0, None)
        if process_rank() != 0:
            return []  # what follows is one process's work
        model = model.cpu() if not torch.cuda.is_available() else model.cuda()
        records = _recorded(Arm(cfg, directory, data, Measure(build(cfg.evaluation), data), fit, started), model)
        publish(loggers, directory, records, model)
    return records


def _recorded(arm: Arm, model: Any) -> list[RunRecord]:
    """The records of a model whose training has ended; the last one is of the model as it is afterwards."""
    cfg = arm.cfg
    if cfg.ptq:
        return quantize_afterwards(arm, model)
    if bit_linears(model):
        return _frozen(arm, model)
    original, figures = arm.beside_the_original(model)
    record = arm.record(cfg.method, model, figures)
    arm.export(model, record)
    return [*original, arm.keep(record)]


def _logged_a_loss(arm: Path) -> bool:
    tables = [path.read_text(encoding="utf-8").partition("\n")[0] for path in arm.glob("csv/*/metrics.csv")]
    return any({"train/loss", "val/loss"} & set(header.split(",")) for header in tables)


def _is_done(cfg: DictConfig, directory: Path) -> bool:
    return (directory / RECORD).exists() and all_exported(cfg, directory)


def _frozen(arm: Arm, model: Any) -> list[RunRecord]:
    """The latent model's record and that of the same model frozen, which has to be worth the same to the last bit."""
    method = arm.cfg.method
    figures = arm.measure(model)[-1]
    latent = arm.record(f"{method} latent", model, figures)
    latent.write(arm.directory / LATENT_RECORD)
    trained = bit_linears(model)
    freeze(model)
    original, measured = arm.beside_the_original(model)
    alone = {name: value for name, value in figures.items() if value is not None}
    if (found := {name: measured[name] for name in alone}) != alone:
        raise AssertionError(f"the frozen model must answer as the trained one: {found} against {alone}")
    frozen = arm.record(f"{method} frozen", model, measured)
    for name, layer in trained:
        model.set_submodule(name, layer)  # formats that can be trained on take the latent weights
    arm.export(model, frozen)
    return [*original, latent, arm.keep(frozen)]


def _build_data(cfg: DictConfig) -> TextDataModule:
    data: TextDataModule = build(cfg.data)
    data.prepare_data()
    data.setup()
    return data


def _build_model(cfg: DictConfig, data: TextDataModule) -> Any:
    tokenizer = data.tokenizer
    vocab_size = cfg.model.vocab_size or data.vocab_size
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if cfg.model.get("subln"):
        ids["calibration"] = calibration_windows(cfg, data)
    model = build_model(cfg, vocab_size=vocab_size, **ids)
    check_vocabulary(tokenizer, model.config.get_text_config().vocab_size)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and cfg.data.block_size > longest:
        raise InputError(
            f"data.block_size={cfg.data.block_size}, and the model takes {longest} tokens at most: lower it"
        )
    return model


def _fit(
    cfg: DictConfig,
    directory: Path,
    data: TextDataModule,
    model: nn.Module,
    loggers: "Sequence[Logger]",
    distillation: Distillation | None,
) -> Fit:
    adapted = build(cfg.lora)(model) if cfg.get("lora") else []
    model.train()  # one from a folder comes in evaluation mode, its dropout switched off
    module = LanguageModelingModule(
        model,
        build(cfg.optim),
        build(cfg.schedule),
        total_steps=cfg.trainer.max_steps,
        compile=cfg.compile,
        distillation=distillation,
    )
    module.bytes_per_token = data.bytes_per_token
    module.tokenizer_fingerprint = data.tokenizer_hash
    callbacks: list[Callback] = list(build_all(cfg.callbacks).values())
    if cfg.get("warmup"):  # first, so that all others see the model of this step
        callbacks.insert(0, QuantizationWarmup(build(cfg.warmup), cfg.trainer.max_steps))
    trainer: Trainer = build(
        cfg.trainer,
        accelerator=_accelerator(cfg),
        val_check_interval=cfg.trainer.val_check_interval * cfg.trainer.accumulate_grad_batches,  # it counts batches
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=directory,
    )
    last = directory / LAST
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    if adapted:
        merge_lora(model)  # plain layers from here on
    model._compiled_call_impl = None  # both forms are evaluated in eager mode: a compiler may add in another order
    return Fit(trainer.global_step, module.tokens, module.mean_tokens_per_s)


def _distillation(cfg: DictConfig, data: TextDataModule, model: nn.Module) -> Distillation | None:
    """The teacher that the configuration names; one that cannot teach ``model``, or has other tokens, is refused."""
    if not cfg.get("distill"):
        return None
    teacher = Path(cfg.distill.teacher)
    if (teacher / "tokenizer.json").is_file():
        theirs, ours = read_tokenizer(str(teacher)).get_vocab(), data.tokenizer.get_vocab()
        if theirs != ours:
            raise InputError(
                f"the teacher in {teacher} has another vocabulary than the data ({len(theirs)} tokens, {len(ours)} "
                f"here): use the teacher's own (data.tokenizer.path={teacher}), or another teacher"
            )
    distillation: Distillation = build(cfg.distill)
    distillation.check(model)
    batches = cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches
    distillation.reserve(batches, cfg.data.batch_size * cfg.data.block_size)
    return distillation


def _accelerator(cfg: DictConfig) -> str:
    """What ``auto`` stands for: CUDA or the CPU. Apple's GPU has no float64, which losses and scales are summed in."""
    if cfg.trainer.accelerator != "auto":
        return cfg.trainer.accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"


def _quiet() -> None:
    """Leave the terminal to the run's own progress: libraries speak up from warnings on."""
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # batches take less than 1 % of a step
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # a sweep's launcher uses it
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")  # the data knows
    warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # lightning 2.6 on torch 2.13
