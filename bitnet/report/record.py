"""One run, one json file: what was run, on what, with which result, and where the code stood.

A record is enough to repeat the run (command, configuration, seed, commit, versions) and to put its result beside
others. It is strict json: a figure that is not finite is no result and is refused when the record is made; one that was
not measured is ``null``.
"""

import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch

from bitnet.errors import InputError
from bitnet.files import atomic_file

FORMAT_VERSION = 2  # 1 had none of the fields from `claimed_bits` on
PACKAGES = ("bitnet-qat", "torch", "lightning", "transformers", "tokenizers", "datasets")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The result of one method on one model and one corpus, and everything needed to repeat it.

    Raises:
        InputError: A number anywhere in the record is NaN or infinite, or a value is none that json has.
    """

    method: str  # "dense", "b1.58 latent", "b1.58 frozen", "gptq" ...
    model: str
    data: dict[str, Any]  # what the data module says of itself: name, hash, tokens
    bits_per_weight: float  # of the quantized linears; every stored bit counted
    bytes: int  # of the whole model
    nll: float | None  # nats per token of the validation text
    perplexity: float | None
    bits_per_byte: float | None
    tokens_per_s: float | None  # of training
    train_tokens: int
    steps: int
    seed: int
    git_sha: str | None
    git_dirty: bool | None
    command: str
    config: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    started: str  # ISO 8601, with its time zone
    seconds: float
    claimed_bits: float | None = None  # bits a weight that the method goes by
    nll_interval: list[float] | None = None  # low and high, 95 %
    gap: float | None = None  # nats a token above the full-precision model, measured on the same tokens
    gap_interval: list[float] | None = None  # low and high, 95 %, of the paired difference
    quantized_share: float | None = None  # quantized weights of the linears, of all parameters
    kl: float | None = None  # mean KL(full precision || this model), nats a token
    top1_agreement: float | None = None  # share of tokens where both hold the same one for the likeliest
    quantize_seconds: float | None = None  # of post-training quantization, calibration included
    evaluation: dict[str, Any] | None = None  # the protocol: text, its hash, window, stride, predicted tokens
    calibration: dict[str, Any] | None = None  # windows and their hash; None where there was no calibration
    tasks: dict[str, float] | None = None  # lm-eval's figures by task/metric
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        for path, value in _leaves(dataclasses.asdict(self), ""):
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"a run record holds finite numbers, got {path} = {value}: store None where none is")
            if not isinstance(value, str | int | float | bool | None):
                raise InputError(f"a run record holds what json has, got {path} of type {type(value).__name__}")

    def write(self, path: str | Path) -> Path:
        """Write the record as json; the file is whole or absent. A record that is there already is replaced."""
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Return the record in ``path``; one of an earlier format has None in the fields that it lacks.

        Raises:
            InputError: There is no such file, it is no json, of another format version, or its fields are not those of
                a record.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"expected a run record at {path}, found no file") from error
        except ValueError as error:
            raise InputError(f"{path} is no run record: {error}") from error
        if not isinstance(stored, dict):
            raise InputError(f"{path} is no run record: expected a json object, got {type(stored).__name__}")
        if (version := stored.pop("format_version", None)) not in range(1, FORMAT_VERSION + 1):
            raise InputError(f"{path} has run record format {version}, this version reads 1 to {FORMAT_VERSION}")
        names = {each.name for each in dataclasses.fields(cls)} - {"format_version"}
        if version == 1:
            names -= {each.name for each in dataclasses.fields(cls) if each.default is None}
        if wrong := sorted(names ^ stored.keys()):
            missing = [name for name in wrong if name in names]
            raise InputError(f"{path} is no run record: missing {missing}, unknown {sorted(set(wrong) - names)}")
        return cls(**stored)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value below ``value`` that holds no other, with its dotted path."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _leaves(each, f"{path}.{index}")
    else:
        yield path, value


def git_state(path: str | Path) -> tuple[str | None, bool | None]:
    """Return the commit that the folder ``path`` stands at, and whether tracked files differ from it.

    (None, None) outside a repository, or without the program git: an installed package has no commit.
    """

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(path), *arguments], capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        sha = git("rev-parse", "HEAD")
    except FileNotFoundError:
        return None, None
    if sha is None:
        return None, None
    return sha, git("status", "--porcelain", "--untracked-files=no") != ""


def machine() -> dict[str, Any]:
    """Return what the speed of a run depends on: processor, cores, threads, accelerator."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
