"""The operator's kernels for NVIDIA GPUs: compiled by NVRTC on the machine that runs them, no toolkit needed.

Importing this registers them; nothing of CUDA is looked for before the first call with a tensor on a GPU.
"""

from bitnet.ops.cuda.dispatch import prepare, states, weights_used

__all__ = ["prepare", "states", "weights_used"]
