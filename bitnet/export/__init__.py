"""Writing models for other programs, and reading them back.

    bitnet.export(model, "hf", directory, tokenizer=tokenizer)     # or "packed", "gguf", "gptq"; options by name
    loaded = bitnet.load(directory)                                # .model, .tokenizer: whichever format it is

Every format is one class: its options are arguments, ``problems`` says beforehand what it cannot carry, and ``write``
reads back what it wrote. This package can be called, as above; `bitnet.export.export` is the function.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet.export.doctor import Diagnosis, diagnose
    from bitnet.export.gguf import GGUFExporter
    from bitnet.export.gptq import GPTQExporter
    from bitnet.export.hf import HuggingFaceExporter, contents
    from bitnet.export.packed import PackedExporter
    from bitnet.export.protocol import Exported, Exporter, ExportError
    from bitnet.export.reading import Loaded, load
    from bitnet.export.writing import FORMATS, export, exporter

__all__ = [
    "FORMATS",
    "Diagnosis",
    "ExportError",
    "Exported",
    "Exporter",
    "GGUFExporter",
    "GPTQExporter",
    "HuggingFaceExporter",
    "Loaded",
    "PackedExporter",
    "contents",
    "diagnose",
    "export",
    "exporter",
    "load",
]

_HOMES = {
    "Diagnosis": "doctor",
    "ExportError": "protocol",
    "Exported": "protocol",
    "Exporter": "protocol",
    "FORMATS": "writing",
    "GGUFExporter": "gguf",
    "GPTQExporter": "gptq",
    "HuggingFaceExporter": "hf",
    "Loaded": "reading",
    "PackedExporter": "packed",
    "contents": "hf",
    "diagnose": "doctor",
    "export": "writing",
    "exporter": "writing",
    "load": "reading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bitnet.export' has no attribute {name!r}: it offers {', '.join(_HOMES)}")
    return getattr(import_module(f"bitnet.export.{_HOMES[name]}"), name)


class _Callable(ModuleType):
    """The package as a function: ``bitnet.export(...)`` in Python and ``python -m bitnet.export`` share one name."""

    def __call__(self, *args: Any, **options: Any) -> "Exported":
        return __getattr__("export")(*args, **options)


sys.modules[__name__].__class__ = _Callable
