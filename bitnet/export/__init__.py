"""Writing models for other programs; every folder is read back before it is handed over."""

from bitnet.export.hf import HuggingFaceExporter, contents
from bitnet.export.protocol import Exporter, ExportError

__all__ = ["ExportError", "Exporter", "HuggingFaceExporter", "contents"]
