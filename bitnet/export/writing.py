"""One way to write any format, from Python and from the command line."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bitnet.errors import InputError
from bitnet.export.protocol import Exported, Exporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = {  # name -> module, class
    "packed": ("bitnet.export.packed", "PackedExporter"),
    "hf": ("bitnet.export.hf", "HuggingFaceExporter"),
    "gguf": ("bitnet.export.gguf", "GGUFExporter"),
    "gptq": ("bitnet.export.gptq", "GPTQExporter"),
}


def export(
    model: nn.Module,
    format: str,
    path: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    record: Mapping[str, Any] | None = None,
    **options: Any,
) -> Exported:
    """Write ``model`` in ``format``, whole or not at all, after reading it back.

    Args:
        model: a causal language model whose linears are dense, trained quantized, frozen or packed. It stays as it is.
        format: "packed", "hf", "gguf" or "gptq".
        path: a new folder; for "gguf" a new file.
        tokenizer: stored beside the model, or in its file.
        record: the run that made the model; see `Exporter.write`.
        options: of the format's class, for example ``type="TQ2_0"``.

    Raises:
        InputError: an unknown format or option, a path that exists, a model that the format cannot carry.
        ExportError: what was written does not give the model back. Nothing is left behind.
    """
    return exporter(format, **options).write(model, tokenizer, path, record)


def exporter(format: str, **options: Any) -> Exporter:
    """The exporter of that name.

    Raises:
        InputError: an unknown format, an option that it does not have, or a value that it refuses.
    """
    kind = exporter_class(format)
    known = options_of(format)
    if strange := sorted(options.keys() - known.keys()):
        raise InputError(f"{format} has no option {strange[0]!r}: it has {', '.join(known) if known else 'none'}")
    return kind(**options)


def exporter_class(format: str) -> Any:
    """The class of a format.

    Raises:
        InputError: an unknown format.
    """
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    module, name = FORMATS[format]
    return getattr(import_module(module), name)


def options_of(format: str) -> dict[str, Any]:
    """Options of a format and their defaults."""
    found = {each.name: each.default for each in fields(exporter_class(format))}
    assert MISSING not in found.values(), f"every option of {format} has a default"
    return found


def describe(done: Exported) -> str:
    """One export in a few lines: what was written, and how near it is to the model."""
    lines = [
        f"{done.path}: {done.format}, {done.bytes:,} bytes",
        f"  {done.contents}",
        f"  read back: {done.layers} layers with equal codes and scales; logits differ by {done.difference:.2g} of "
        "their spread",
    ]
    if done.runtime is not None:
        lines.append(f"  {done.runtime}: logits differ by {done.runtime_difference:.2g} of their spread")
    return "\n".join(lines)
