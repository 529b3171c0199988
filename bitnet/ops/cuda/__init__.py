"""The operator's kernels for NVIDIA GPUs: compiled by NVRTC on the machine that runs them, no toolkit needed."""
