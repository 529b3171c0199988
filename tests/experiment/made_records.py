"""Records of runs that never were."""

import math

from bitnet.report import RunRecord


def record(method: str, nll: float, **changes) -> RunRecord:
    fields = {
        "model": "nano",
        "data": {"name": "pydocs"},
        "bits_per_weight": 32.0,
        "bytes": 1000,
        "nll": nll,
        "perplexity": math.exp(nll),
        "config": {},
        "versions": {},
        "machine": {},
        "started": "",
        "command": "",
    }
    unknown = dict.fromkeys(["bits_per_byte", "tokens_per_s", "git_sha", "git_dirty"])
    counts = dict.fromkeys(["train_tokens", "steps", "seed", "seconds"], 0)
    return RunRecord(method=method, **(fields | unknown | counts | changes))
