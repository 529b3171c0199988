"""GGUF: files for llama.cpp and what is built on it, written, read back and held against llama.cpp itself."""

from bitnet.export.gguf.exporter import GGUFExporter
from bitnet.export.gguf.reader import read

__all__ = ["GGUFExporter", "read"]
