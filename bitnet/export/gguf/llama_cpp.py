"""llama.cpp's own logits for a file, through llama-cpp-python where that is installed."""

from importlib import import_module, metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitnet.export.protocol import ExportError

if TYPE_CHECKING:
    from bitnet.export.gguf.reader import GGUFFile

FLOAT32 = 0  # ggml's number of the type, for the cache of keys and values
NOT_IN_LLAMA_CPP = ("bitnet-b1.58",)


def computes(file: "GGUFFile") -> bool:
    """Whether llama-cpp-python is installed, and the file one for llama.cpp (and not for bitnet.cpp)."""
    here = util.find_spec("llama_cpp") is not None
    types = {entry.type.name for entry in file.container.tensors.values()}
    return here and "I2_S" not in types and file.architecture.name not in NOT_IN_LLAMA_CPP


def version() -> str:
    """For example "llama-cpp-python 0.3.36"."""
    return f"llama-cpp-python {metadata.version('llama_cpp_python')}"


def opened(path: Path, context: int) -> Any:
    """A ``llama_cpp.Llama`` with logits for every position and a float32 cache of keys and values.

    Raises:
        ExportError: llama.cpp does not load the file.
    """
    llama: Any = import_module("llama_cpp")
    try:
        return llama.Llama(
            str(path),
            n_ctx=context,
            n_batch=context,
            logits_all=True,
            verbose=False,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            type_k=FLOAT32,
            type_v=FLOAT32,
            flash_attn=False,
        )
    except ValueError as error:
        raise ExportError(f"llama.cpp does not load the file: {error}") from error


def logits(path: Path, ids: Tensor) -> Tensor:
    """Float32 logits [rows, tokens, vocabulary] of token ids [rows, tokens], each row a text of its own."""
    model = opened(path, ids.shape[-1])
    try:
        rows = []
        for row in ids.tolist():
            model.reset()
            model.eval(row)
            rows.append(torch.from_numpy(model.scores[: len(row)].copy()))
        return torch.stack(rows).float()
    finally:
        model.close()
