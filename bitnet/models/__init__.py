"""Causal language models on transformers' own bodies, so that every checkpoint loads everywhere."""

from bitnet.models.build import causal_lm
from bitnet.models.doctor import ConversionReport, diagnose_conversion
from bitnet.models.pretrained import from_directory
from bitnet.models.scratch import Size, from_scratch
from bitnet.models.subln import insert_subln

__all__ = [
    "ConversionReport",
    "Size",
    "causal_lm",
    "diagnose_conversion",
    "from_directory",
    "from_scratch",
    "insert_subln",
]
