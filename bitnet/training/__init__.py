"""Training: the module, its optimizer and schedules, checkpoints that resume exactly, and callbacks that watch."""

from bitnet.training.checkpoint import AtomicCheckpointIO
from bitnet.training.distill import AttentionRelations, Distillation, HiddenStates, LogitKL
from bitnet.training.guard import NonFiniteError, NonFiniteGuard
from bitnet.training.health import HealthTelemetry
from bitnet.training.last_and_best import LastAndBest
from bitnet.training.module import LanguageModelingModule
from bitnet.training.optim import adamw
from bitnet.training.progress import TrainingProgress
from bitnet.training.random_state import RandomState
from bitnet.training.samples import WriteSamples, generate
from bitnet.training.schedules import Factors, Schedule, constant, cosine, two_stage, wsd
from bitnet.training.small_states import adafactor, adamw8bit
from bitnet.training.teacher_cache import TeacherCache
from bitnet.training.warmup import QuantizationWarmup, WarmUp

__all__ = [
    "AtomicCheckpointIO",
    "AttentionRelations",
    "Distillation",
    "Factors",
    "HealthTelemetry",
    "HiddenStates",
    "LanguageModelingModule",
    "LastAndBest",
    "LogitKL",
    "NonFiniteError",
    "NonFiniteGuard",
    "QuantizationWarmup",
    "RandomState",
    "Schedule",
    "TeacherCache",
    "TrainingProgress",
    "WarmUp",
    "WriteSamples",
    "adafactor",
    "adamw",
    "adamw8bit",
    "constant",
    "cosine",
    "generate",
    "two_stage",
    "wsd",
]
