"""Distillation: what a trained model knows about the same tokens, as further terms of the loss.

The teacher is a full-precision model in evaluation mode that learns nothing and draws no random numbers, so a resumed
run sees the very same targets; nothing of it goes into a checkpoint. It reads the student's batch, in one more forward
pass. Three things can be compared, each a term with a weight of its own:

logits      the distribution of the next token, softened by a temperature
hidden      what leaves some of the blocks
relations   how alike the queries, keys and values of one layer are between the tokens of a block (MiniLM, BitDistill)

The objective is ``cross_entropy * CE + sum of weight * term``. Each term is a mean over tokens, so that its weight does
not depend on the batch; ``train/loss`` stays the cross-entropy alone, comparable with a run without a teacher.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.nn.linears import weight_of
from bitnet.nn.lora import base_name
from bitnet.training.taps import Taps
from bitnet.training.teacher_cache import Answers, TeacherCache, TopLogProbs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEASURES = ("mse", "cosine")


@dataclass(frozen=True, slots=True)
class Seen:
    """What one model made of a batch: logits ``[batch, block, vocabulary]``, and outputs of modules by name."""

    logits: Answers  # of a cached teacher perhaps the likeliest tokens alone
    outputs: Mapping[str, Tensor]


class Term(Protocol):
    """One comparison of student and teacher."""

    weight: float

    def places(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules whose outputs are compared, by a name that is the same for student and teacher."""
        ...

    def loss(self, student: Seen, teacher: Seen, predicted: Tensor) -> Tensor:
        """A float32 scalar; ``predicted`` [batch, block] tells the positions whose next token is predicted."""
        ...


@dataclass(frozen=True, slots=True)
class LogitKL:
    """KL divergence in nats a predicted token, teacher || student, of distributions softened by ``temperature``.

    Multiplied by the temperature squared, which keeps the size of its gradient (Hinton et al., arXiv:1503.02531).

    Raises:
        InputError: ``weight`` or ``temperature`` is not positive.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("logits.weight", self.weight)
        _check_positive("logits.temperature", self.temperature)

    def places(self, model: nn.Module) -> dict[str, nn.Module]:
        return {}

    def loss(self, student: Seen, teacher: Seen, predicted: Tensor) -> Tensor:
        assert isinstance(student.logits, Tensor)
        if isinstance(teacher.logits, TopLogProbs):
            divergence = teacher.logits.divergence(student.logits, self.temperature)
        else:
            ours, theirs = (
                F.log_softmax(each.float() / self.temperature, -1) for each in (student.logits, teacher.logits)
            )
            divergence = (theirs.exp() * (theirs - ours)).sum(-1)
        return (divergence * predicted).sum() / predicted.sum().clamp(min=1) * self.temperature**2


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Distance of what leaves the blocks ``layers``: mean over layers and all tokens of the block.

    Args:
        weight: of the term.
        measure: "mse": mean squared difference over the teacher's mean square; "cosine": 1 - cosine of each token.
        layers: of the list of blocks, from the end where negative. Student and teacher must be equally wide there.

    Raises:
        InputError: values that do not exist, or models without such blocks.
    """

    weight: float = 1.0
    measure: str = "mse"
    layers: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        _check_positive("hidden.weight", self.weight)
        if self.measure not in MEASURES:
            raise InputError(f"distill.hidden.measure must be one of {', '.join(MEASURES)}, got {self.measure!r}")
        object.__setattr__(self, "layers", tuple(self.layers))  # a yaml gives a list
        if not self.layers:
            raise InputError("distill.hidden.layers must name a layer or more, such as [-1]")

    def places(self, model: nn.Module) -> dict[str, nn.Module]:
        return {f"hidden.{layer}": _block(model, layer) for layer in self.layers}

    def loss(self, student: Seen, teacher: Seen, predicted: Tensor) -> Tensor:
        return torch.stack([self._distance(*_pair(student, teacher, f"hidden.{n}")) for n in self.layers]).mean()

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if ours.shape != theirs.shape:
            raise InputError(
                f"hidden states can be compared where both models are equally wide, got {ours.shape[-1]} and the "
                f"teacher's {theirs.shape[-1]}: leave out distill.hidden, relations take any width"
            )
        if self.measure == "cosine":
            return (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean()
        return (ours - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)


@dataclass(frozen=True, slots=True)
class AttentionRelations:
    """KL divergence in nats of the relations between tokens, teacher || student, for each of the ``projections``.

    The output of a projection, ``[block, heads, width]``, gives a relation a head: ``softmax(A A^T / sqrt(width))``,
    a distribution over the tokens of the block for each token. Widths and numbers of layers may differ. Mean over
    batch, heads and tokens, sum over the projections. Positions are not rotated in yet.

    Args:
        weight: of the term. The divergences are small (1e-4 between models at toy size): weigh them high.
        layer: of the list of blocks, from the end where negative.
        heads: that the outputs are split into, for student and teacher alike; it divides their widths.
        projections: names inside a block, their ends suffice.

    Raises:
        InputError: values that do not exist, or models without such layers.

    Source: BitDistill, arXiv:2510.13998; MiniLMv2, arXiv:2012.15828.
    """

    weight: float = 1.0
    layer: int = -1
    heads: int = 1
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")

    def __post_init__(self) -> None:
        _check_positive("relations.weight", self.weight)
        if type(self.heads) is not int or self.heads < 1:
            raise InputError(f"distill.relations.heads must be a positive whole number, got {self.heads!r}")
        object.__setattr__(self, "projections", tuple(self.projections))  # a yaml gives a list
        if not self.projections:
            raise InputError(
                "distill.relations.projections must name a layer or more, such as [q_proj, k_proj, v_proj]"
            )

    def places(self, model: nn.Module) -> dict[str, nn.Module]:
        block = _block(model, self.layer)
        return {f"relations.{name}": self._projection(block, name) for name in self.projections}

    def loss(self, student: Seen, teacher: Seen, predicted: Tensor) -> Tensor:
        total = torch.zeros((), device=predicted.device)
        for name in self.projections:
            ours, theirs = map(self._relations, _pair(student, teacher, f"relations.{name}"))
            total = total + (theirs.exp() * (theirs - ours)).sum(-1).mean()
        return total

    def _relations(self, states: Tensor) -> Tensor:
        """Logarithms of the relations ``[batch, heads, block, block]`` of ``[batch, block, heads * width]``."""
        split = states.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return F.log_softmax(split @ split.transpose(2, 3) / math.sqrt(split.shape[-1]), -1)

    def _projection(self, block: nn.Module, end: str) -> nn.Module:
        found = [module for name, module in block.named_modules() if f".{name}".endswith(f".{end}")]
        if len(found) != 1:
            names = ", ".join(name for name, module in block.named_modules() if _has_matrix(module))
            raise InputError(
                f"expected one layer {end!r} in a block of {type(block).__name__}, got {len(found)} among {names}: set "
                "distill.relations.projections, or leave out distill.relations"
            )
        if (width := weight_of(found[0]).shape[0]) % self.heads:
            raise InputError(f"distill.relations.heads must divide the {width} outputs, got {self.heads}")
        return found[0]


class Distillation:
    """A teacher and the terms that compare a student with it.

    Args:
        teacher: a causal language model, or the Hugging Face directory of one.
        dtype: of the teacher's weights: "float32", or "bfloat16" for half the memory.
        cross_entropy: weight of the student's own loss; 0 learns from the teacher alone.
        logits, hidden, relations: the terms; None leaves one out.
        cache: keeps the teacher's logits on disk, see `bitnet.training.teacher_cache`; goes with ``logits`` alone.

    Raises:
        InputError: no teacher, no term, an unknown dtype, a directory that cannot be loaded, or a cache that does not
            fit.
    """

    def __init__(
        self,
        teacher: nn.Module | str | Path | None,
        *,
        dtype: str = "float32",
        cross_entropy: float = 1.0,
        logits: LogitKL | None = None,
        hidden: HiddenStates | None = None,
        relations: AttentionRelations | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        self.terms: dict[str, Term] = {
            name: term
            for name, term in {"logits": logits, "hidden": hidden, "relations": relations}.items()
            if term is not None
        }
        if not self.terms:
            raise InputError("distillation compares something: give logits, hidden or relations")
        if dtype not in DTYPES:
            raise InputError(f"distill.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if not 0 <= cross_entropy < math.inf:
            raise InputError(f"distill.cross_entropy must be 0 or more, got {cross_entropy}")
        cached = cache is not None and cache.directory is not None
        if cached and self.terms.keys() != {"logits"}:
            raise InputError("distill.cache keeps logits alone: leave out distill.hidden and distill.relations, or it")
        if teacher is None:
            raise InputError("distill.teacher is missing: give the directory of a trained model")
        model = teacher if isinstance(teacher, nn.Module) else _read(teacher)
        self.teacher = model.to(DTYPES[dtype]).eval().requires_grad_(False)
        self.cross_entropy = cross_entropy
        self._student, self._teacher = Taps(), Taps()
        temperature = 1.0 if logits is None else logits.temperature
        self._store = cache.open(self.teacher, temperature) if cached and cache is not None else None

    def check(self, student: nn.Module) -> None:
        """Refuse a student that this teacher cannot teach.

        Raises:
            InputError: another vocabulary, or a model without the layers that a term compares.
        """
        sizes = [model.get_input_embeddings().num_embeddings for model in (student, self.teacher)]  # pyright: ignore
        if sizes[0] != sizes[1]:
            raise InputError(
                f"the teacher must have the student's vocabulary of {sizes[0]} tokens, got {sizes[1]}: use a teacher "
                "with the same tokenizer"
            )
        for model in (student, self.teacher):
            self._places(model)

    def attach(self, student: nn.Module) -> None:
        """Begin to note what the compared layers of both models answer; before the student is compiled."""
        self._student.attach(student, self._places(student))
        self._teacher.attach(self.teacher, self._places(self.teacher))

    def detach(self) -> None:
        """End it: the student is as it was before `attach`."""
        self._student.detach()
        self._teacher.detach()

    def share(self, student: nn.Module) -> int:
        """Move the teacher to the student's device, and let it keep what the student does not train in its memory.

        Weights of one name, dtype and value that need no gradient are then one tensor. Returns their bytes.
        """
        theirs = {base_name(name): parameter for name, parameter in student.named_parameters()}
        self.teacher.to(next(iter(theirs.values())).device)
        shared = 0
        for name, parameter in self.teacher.named_parameters():
            other = theirs.get(name)
            if other is None or other.requires_grad or other.dtype != parameter.dtype:
                continue
            if other.shape == parameter.shape and torch.equal(other, parameter):
                parameter.data = other.data
                shared += parameter.nbytes
        return shared

    def losses(self, logits: Tensor, inputs: Mapping[str, Tensor], predicted: Tensor) -> dict[str, Tensor]:
        """Every term, not weighted, as a float32 scalar with a gradient for the student.

        Args:
            logits: of the student, whose forward pass was the latest one.
            inputs: what it was called with: ``input_ids`` and, where positions restart, ``position_ids``.
            predicted: [batch, block], where a next token is predicted.
        """
        with torch.no_grad():
            answers = (
                self._ask(inputs) if self._store is None else self._store.answers(inputs, lambda: self._ask(inputs))
            )
            theirs = Seen(answers, self._teacher.take())
        ours = Seen(logits, self._student.take())
        return {name: term.loss(ours, theirs, predicted) for name, term in self.terms.items()}

    def _ask(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.teacher(**inputs, use_cache=False).logits

    def reserve(self, batches: int, tokens: int) -> None:
        """Refuse a run whose answers the cache cannot hold: ``batches`` of so many ``tokens``; see `AnswerStore`."""
        if self._store is not None:
            self._store.reserve(batches, tokens)

    def objective(self, cross_entropy: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        """What is minimised."""
        total = self.cross_entropy * cross_entropy
        for name, loss in losses.items():
            total = total + self.terms[name].weight * loss
        return total

    def _places(self, model: nn.Module) -> dict[str, nn.Module]:
        return {key: place for term in self.terms.values() for key, place in term.places(model).items()}


def _read(directory: str | Path) -> nn.Module:
    from bitnet.models import from_directory  # brings transformers

    if not (Path(directory) / "config.json").is_file():
        raise InputError(f"distill.teacher must be a Hugging Face directory with a config.json, got {directory}")
    return cast(nn.Module, from_directory(directory))


def _pair(student: Seen, teacher: Seen, name: str) -> tuple[Tensor, Tensor]:
    return student.outputs[name].float(), teacher.outputs[name].float()


def _block(model: nn.Module, layer: int) -> nn.Module:
    """A block of the list of modules that holds the most weights."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of blocks to compare: leave only distill.logits")
    blocks = max(lists, key=lambda each: sum(parameter.numel() for parameter in each.parameters()))
    if type(layer) is not int or not -len(blocks) <= layer < len(blocks):
        raise InputError(f"layers are {-len(blocks)} ... {len(blocks) - 1} in {type(model).__name__}, got {layer!r}")
    return blocks[layer]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() == 2 for parameter in module.parameters(recurse=False))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InputError(f"distill.{name} must be a positive number, got {value!r}")
