"""A teacher's logits on disk: runs that read the same batches ask it once.

A file holds the answer to one batch, and its name is a hash of what the teacher was asked (ids, positions, precision,
kind of device), so it does not matter when or by which run it was written: a resumed run, one with another learning
rate, two at a time. The folder belongs to one teacher, known by a hash of its weights. Bytes a token:

    everything            vocabulary * 4 (float32) or * 2: 16 or 8 KB of 4,096 tokens, 513 or 256 KB of 128,256
    top=k                 k * (2 or 4 + the id's 2 or 4) + 4: 0.3 KB of 4,096 tokens with k = 64 in 16 bits

Everything in float32 is what the teacher said, to the bit, and training ends in the same bits as without a cache. In
16 bits every logit is rounded once. Of the top k the logarithms of their probabilities are kept, and of the rest what
they have together: the divergence is then that of k + 1 outcomes, which is never above the whole one. What is used is
always what was stored, so a run does not depend on who filled the cache.

Files are written beside their names and renamed; one that is damaged is said to be, and written anew.
"""

import errno
import hashlib
import json
import math
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.files import atomic_file, new_file, readable_bytes

FORMAT = 1
VALUES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IDENTITY = "teacher.json"
RESERVE = 1e9  # bytes of the disk that are left free


@dataclass(frozen=True, slots=True)
class TopLogProbs:
    """The likeliest tokens of each position, and how likely all others are together, at one temperature.

    Attributes:
        values: float32 [*positions, k], logarithms of probabilities.
        ids: [*positions, k], which tokens they belong to.
        rest: float32 [*positions], the logarithm of the probability of all other tokens.
    """

    values: Float[Tensor, "*positions k"]
    ids: Integer[Tensor, "*positions k"]
    rest: Float[Tensor, "*positions"]

    @classmethod
    def of(cls, logits: Float[Tensor, "*positions vocabulary"], top: int, temperature: float) -> "TopLogProbs":
        """The ``top`` likeliest of softmax(logits / temperature)."""
        logs = F.log_softmax(logits.float() / temperature, -1)
        values, ids = logs.topk(top, -1)
        return cls(values, ids, logs.scatter(-1, ids, -torch.inf).logsumexp(-1))

    def divergence(
        self, logits: Float[Tensor, "*positions vocabulary"], temperature: float
    ) -> Float[Tensor, "*positions"]:
        """KL of these k + 1 outcomes from those of softmax(logits / temperature), in nats."""
        ours = F.log_softmax(logits.float() / temperature, -1)
        rest = ours.scatter(-1, self.ids.long(), -torch.inf).logsumexp(-1)
        top = (self.values.exp() * (self.values - ours.gather(-1, self.ids.long()))).sum(-1)
        return top + self.rest.exp() * (self.rest - rest)


Answers = Tensor | TopLogProbs


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCache:
    """Where a teacher's logits are kept, and how exactly.

    Args:
        directory: made where it does not exist; None: nothing is kept.
        values: "float32", or 16 bits a number: "bfloat16", "float16".
        top: the likeliest tokens of each position; None: all of the vocabulary.
        limit: bytes that the folder may grow to.

    Raises:
        InputError: values that do not exist.
    """

    directory: str | Path | None = None
    values: str = "float32"
    top: int | None = None
    limit: float = 20e9

    def __post_init__(self) -> None:
        if self.values not in VALUES:
            raise InputError(f"distill.cache.values must be one of {', '.join(VALUES)}, got {self.values!r}")
        if self.top is not None and (type(self.top) is not int or self.top < 1):
            raise InputError(f"distill.cache.top must be a positive whole number, or null for all, got {self.top!r}")
        if isinstance(self.limit, bool | str) or not 0 < self.limit < math.inf:
            raise InputError(f"distill.cache.limit must be a positive number of bytes, got {self.limit!r}")

    def bytes_per_token(self, vocabulary: int) -> int:
        """What one position takes on the disk."""
        width = VALUES[self.values].itemsize
        return vocabulary * width if self.top is None else self.top * (width + _id_dtype(vocabulary).itemsize) + 4

    def open(self, teacher: nn.Module, temperature: float) -> "AnswerStore":
        """The folder, for the answers of ``teacher`` softened by ``temperature`` (which only ``top`` depends on).

        Raises:
            InputError: the folder is another teacher's, or was written with other options.
        """
        return AnswerStore(self, teacher, temperature)


class AnswerStore:
    """One teacher's answers in one folder; see `TeacherCache`."""

    def __init__(self, options: TeacherCache, teacher: nn.Module, temperature: float) -> None:
        assert options.directory is not None
        self._options, self._folder = options, Path(options.directory)
        self._temperature = temperature
        self._vocabulary = int(teacher.get_input_embeddings().num_embeddings)  # pyright: ignore
        if options.top is not None and options.top >= self._vocabulary:
            raise InputError(
                f"distill.cache.top must be below the vocabulary's {self._vocabulary} tokens, got {options.top}: set "
                "it to null to keep all"
            )
        identity = {
            "format": FORMAT,
            "teacher": fingerprint(teacher),
            "values": options.values,
            "top": options.top,
            "temperature": None if options.top is None else temperature,
        }
        self._claim(identity)
        self._bytes = sum(path.stat().st_size for path in self._folder.glob("*/*.safetensors"))

    def reserve(self, batches: int, tokens: int) -> None:
        """Refuse a run of ``batches`` of so many ``tokens`` that the disk or the limit does not hold.

        Raises:
            InputError: what is still to be written is too much.
        """
        needed = max(0, batches * tokens * self._options.bytes_per_token(self._vocabulary) - self._bytes)
        free = shutil.disk_usage(self._folder).free - RESERVE
        room = min(free, self._options.limit - self._bytes)
        if needed > room:
            what = "the disk" if free == room else "distill.cache.limit"
            raise InputError(
                f"the teacher's answers to {batches:,} batches of {tokens:,} tokens need {readable_bytes(needed)} more "
                f"in {self._folder}, and {what} leaves {readable_bytes(max(room, 0))}: set distill.cache.top=64, "
                "distill.cache.values=bfloat16, another folder, a higher limit, or no cache"
            )

    def answers(self, inputs: Mapping[str, Tensor], ask: Callable[[], Tensor]) -> Answers:
        """What the folder holds for this batch; where that is nothing, or damaged, what ``ask()`` says is stored first.

        Raises:
            InputError: the disk is full, or the folder as large as it may get.
        """
        device = inputs["input_ids"].device
        path = self._path(inputs, device)
        tensors = self._read(path, inputs["input_ids"].shape)
        if tensors is None:
            tensors = self._encoded(ask())
            self._write(path, tensors)
        return self._decoded({name: tensor.to(device) for name, tensor in tensors.items()})

    def _claim(self, identity: dict[str, Any]) -> None:
        path = self._folder / IDENTITY
        if not path.exists():
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with new_file(path) as partial:
                    partial.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
            except InputError:  # another process was faster: its file is read
                if not path.exists():
                    raise
            except OSError as error:
                raise InputError(
                    f"distill.cache.directory must be a folder that can be written, got {self._folder}: "
                    f"{error.strerror or error}"
                ) from error
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            others = sorted(key for key in identity if found.get(key) != identity[key])
        except (ValueError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged: delete the folder, or choose another distill.cache.directory"
            ) from error
        if others:
            raise InputError(
                f"{self._folder} holds answers of another teacher or in another form ({', '.join(others)} differ): "
                "choose another distill.cache.directory, or delete it"
            )

    def _path(self, inputs: Mapping[str, Tensor], device: torch.device) -> Path:
        kind = device.type
        precision = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "none"
        digest = hashlib.sha256(f"{kind} {precision}".encode())
        for name in sorted(inputs):
            ids = inputs[name].detach().cpu().contiguous()
            digest.update(f"{name} {ids.dtype} {list(ids.shape)}".encode() + ids.numpy().tobytes())
        name = digest.hexdigest()[:40]
        return self._folder / name[:2] / f"{name}.safetensors"

    def _encoded(self, logits: Tensor) -> dict[str, Tensor]:
        dtype, top = VALUES[self._options.values], self._options.top
        if top is None:
            tensors = {"logits": logits.to(dtype)}
        else:
            found = TopLogProbs.of(logits, top, self._temperature)
            ids = found.ids.to(_id_dtype(self._vocabulary))
            tensors = {"values": found.values.to(dtype), "ids": ids, "rest": found.rest}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise InputError(
                f"the teacher's logits are not finite in {self._options.values}: set distill.cache.values=float32; "
                "where they are not even so, the teacher is damaged"
            )
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def _decoded(self, tensors: dict[str, Tensor]) -> Answers:
        if self._options.top is None:
            return tensors["logits"]
        return TopLogProbs(tensors["values"].float(), tensors["ids"], tensors["rest"])

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes + size > self._options.limit:
            raise InputError(
                f"{self._folder} has grown to distill.cache.limit, {readable_bytes(self._options.limit)}: raise it, or "
                "delete the folder"
            )
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as partial:
                save_file(tensors, partial, metadata={"crc32": str(_checksum(tensors))})
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
            if not full:
                raise
            raise InputError(
                f"the disk of {self._folder} is full: free space, or set distill.cache.directory to another disk; the "
                "run goes on from its last checkpoint with resume="
            ) from error
        self._bytes += size

    def _read(self, path: Path, shape: torch.Size) -> dict[str, Tensor] | None:
        """The tensors of a file; None where there is none, or a damaged one, which is then said."""
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
                stored = (file.metadata() or {}).get("crc32")
            names = {"logits"} if self._options.top is None else {"values", "ids", "rest"}
            whole = tensors.keys() == names and stored == str(_checksum(tensors))
            if whole and all(tensor.shape[:2] == shape for tensor in tensors.values()):
                return tensors
        except (SafetensorError, OSError):
            pass
        print(f"the teacher's answer {path} is damaged: asking the teacher again", file=sys.stderr, flush=True)
        return None


def fingerprint(teacher: nn.Module) -> str:
    """SHA-256 of a model's class, its config and every tensor in it."""
    config = getattr(teacher, "config", None)
    settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    for where in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        settings.pop(where, None)
    digest = hashlib.sha256(f"{type(teacher).__name__} {json.dumps(settings, sort_keys=True, default=str)}".encode())
    for name, tensor in _tensors(teacher):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _tensors(teacher: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from teacher.named_parameters()
    yield from teacher.named_buffers()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), total))
    return total


def _id_dtype(vocabulary: int) -> torch.dtype:
    return torch.int16 if vocabulary <= 1 << 15 else torch.int32
