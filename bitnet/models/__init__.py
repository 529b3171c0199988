"""Causal language models on transformers' own bodies, so that every checkpoint loads everywhere."""

from bitnet.models.build import causal_lm
from bitnet.models.pretrained import from_directory
from bitnet.models.scratch import Size, from_scratch

__all__ = ["Size", "causal_lm", "from_directory", "from_scratch"]
