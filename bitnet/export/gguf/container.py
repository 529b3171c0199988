"""The GGUF container: key-value pairs, a table of tensors, and their bytes. Version 3, little-endian.

::

    "GGUF"   version u32   tensors u64   pairs u64
    pair     key string   type u32   value            string: length u64, UTF-8; array: type u32, count u64, values
    tensor   name string   dimensions u32   each u64, the row's length first   type u32   offset u64
    padding to the alignment (32), then the tensors' bytes, each from a multiple of the alignment on

Written here, and not with gguf-py, because a tensor's bytes are then made when their turn comes: one matrix is in
memory beside the model, and types that gguf-py does not know yet (Q2_0, Q1_0, I2_S) need no exception. Read here,
because every count in a file may be a lie: each is held against the bytes that are left before anything is allocated or
repeated.
Source: the GGUF specification of the ggml project; gguf-py is the oracle of the tests.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.errors import InputError
from bitnet.export.gguf.types import NUMBERS, TensorType, tensor_type

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
LONGEST_NAME = 63  # bytes: ggml keeps names in 64 with a zero at the end
SCALARS = {  # type number -> struct code
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
STRING, ARRAY = 8, 9
CODES = {number: code for number, code in SCALARS.values()}


@dataclass(frozen=True, slots=True)
class Value:
    """A value with its type: one of `SCALARS` or "str", with "[]" behind it for an array."""

    type: str
    value: Any


@dataclass(frozen=True, slots=True)
class Blob:
    """A tensor to write. ``data`` makes its bytes (uint8, any shape) when they are due; their number must be right."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    data: Callable[[], Tensor]


def write_container(path: Path, pairs: Mapping[str, Value], blobs: Sequence[Blob]) -> None:
    """Write a file, one tensor in memory at a time.

    Raises:
        InputError: a name longer than ggml allows.
    """
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(blobs), len(pairs)))
    for key, value in pairs.items():
        header += _string(key) + _pair(value)
    position = 0
    for blob in blobs:
        if len(blob.name.encode()) > LONGEST_NAME:
            raise InputError(f"a tensor's name has at most {LONGEST_NAME} bytes in a GGUF file, got {blob.name!r}")
        header += _string(blob.name) + struct.pack("<I", len(blob.shape))
        header += struct.pack(f"<{len(blob.shape)}Q", *reversed(blob.shape))
        header += struct.pack("<IQ", blob.type.number, position)
        position += _padded(blob.type.size(blob.shape))
    with open(path, "wb") as file:
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for blob in blobs:
            data = blob.data().cpu().contiguous().numpy().reshape(-1).data
            assert len(data) == blob.type.size(blob.shape), f"{blob.name}: {len(data)} bytes for {blob.shape}"
            file.write(data)
            file.write(bytes(-len(data) % ALIGNMENT))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file: shape with the row last, first byte in the file."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    start: int


class Container:
    """A GGUF file, its header read and checked, its tensors mapped: their bytes are read when they are used.

    Attributes:
        path: the file.
        pairs: values by key: int, float, bool, str, list of str, or a numpy array.
        tensors: by name, in the order of the file.

    Raises:
        InputError: no GGUF file of version 3, or one that is truncated or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"expected a GGUF file, and {path} is none")
        if self.path.stat().st_size < 24:
            raise InputError(f"{path} is {self.path.stat().st_size} bytes long, and a GGUF header takes 24: truncated?")
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="c")  # private: nobody can change the file through it
        cursor = _Cursor(self._bytes, str(path))
        if (magic := cursor.take(4)) != MAGIC:
            raise InputError(f"{path} is no GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        version, tensors, pairs = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
        if version != VERSION:
            other = " (big-endian)" if version == int.from_bytes(struct.pack(">I", VERSION), "little") else ""
            raise InputError(f"{path} is GGUF version {version}{other}: only version {VERSION}, little-endian, is read")
        cursor.expect(pairs, 8 + 4 + 1, "key-value pairs")
        cursor.expect(tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        self.pairs = self._read_pairs(cursor, pairs)
        self.tensors = self._read_table(cursor, tensors)

    def bytes(self, name: str) -> Tensor:
        """The bytes of a tensor, uint8 [bytes], mapped: changing them changes no file."""
        entry = self.tensors[name]
        return torch.from_numpy(self._bytes[entry.start : entry.start + entry.type.size(entry.shape)])

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises InputError where it is missing (and has no default) or is none."""
        return self._typed(key, str, "a string", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number, not negative. Raises InputError like `text`."""
        value = self._typed(key, int, "a whole number", default)
        if isinstance(value, bool) or value < 0:
            raise InputError(f"{self.path}: {key} must be a whole number, not negative, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises InputError like `text`."""
        value = float(self._typed(key, int | float, "a number", default))
        if not np.isfinite(value):
            raise InputError(f"{self.path}: {key} must be finite, got {value}")
        return value

    def _typed(self, key: str, kind: Any, what: str, default: Any) -> Any:
        value = self.pairs.get(key, default)
        if not isinstance(value, kind):
            found = "which is missing" if value is None else f"got {type(value).__name__}"
            raise InputError(f"{self.path}: expected {what} under {key}, {found}")
        return value

    def _read_pairs(self, cursor: "_Cursor", count: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.string("a key")
            if key in pairs:
                raise InputError(f"{self.path} holds the key {key!r} twice")
            pairs[key] = cursor.value(cursor.number("I"), key)
        return pairs

    def _read_table(self, cursor: "_Cursor", count: int) -> dict[str, TensorEntry]:
        alignment = self.integer("general.alignment", ALIGNMENT)
        if alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 16:
            raise InputError(f"{self.path}: general.alignment must be a power of two from 8 on, got {alignment}")
        found: list[tuple[str, tuple[int, ...], TensorType, int]] = []
        for _ in range(count):
            name = cursor.string("a tensor's name")
            dimensions = cursor.number("I")
            if not 1 <= dimensions <= 4:
                raise InputError(f"{self.path}: {name} has {dimensions} dimensions: 1 to 4 are possible")
            shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
            number, offset = cursor.number("I"), cursor.number("Q")
            if number not in NUMBERS:
                raise InputError(
                    f"{self.path}: {name} is of the type number {number}, which is not read here: "
                    f"known are {', '.join(each.name for each in NUMBERS.values())}"
                )
            found.append((name, shape, NUMBERS[number], offset))
        return self._placed(found, -(-cursor.position // alignment) * alignment, alignment)

    def _placed(self, found: list[tuple[str, tuple[int, ...], TensorType, int]], base: int, alignment: int) -> Any:
        entries: dict[str, TensorEntry] = {}
        expected, length = 0, len(self._bytes)
        for name, shape, type, offset in found:
            if name in entries:
                raise InputError(f"{self.path} holds the tensor {name} twice")
            if 0 in shape or prod(shape) > 8 * length:
                raise InputError(f"{self.path}: {name} of shape {list(shape)} cannot lie in {length} bytes")
            if shape[-1] % type.block:
                raise InputError(
                    f"{self.path}: rows of {name} ({type.name}) are {shape[-1]}, no multiple of {type.block}"
                )
            if offset != expected:
                raise InputError(
                    f"{self.path}: {name} is said to begin at byte {offset} of the data, and {expected} is where the "
                    "one before it ends: tensors overlap or leave gaps, the file is damaged"
                )
            size = type.size(shape)
            if base + offset + size > length:
                raise InputError(
                    f"{self.path} is truncated: {name} ends at byte {base + offset + size}, the file at {length}"
                )
            entries[name] = TensorEntry(name, shape, type, base + offset)
            expected += -(-size // alignment) * alignment
        return entries


class _Cursor:
    """Reads forward, and never further than there are bytes."""

    def __init__(self, data: np.ndarray, path: str) -> None:
        self.data, self.path, self.position = data, path, 0

    def take(self, count: int) -> bytes:
        self.expect(count, 1, "bytes")
        self.position += count
        return self.data[self.position - count : self.position].tobytes()

    def expect(self, count: int, least: int, what: str) -> None:
        """Refuse a count of things, of at least ``least`` bytes each, that the rest of the file cannot hold."""
        left = len(self.data) - self.position
        if count * least > left:
            raise InputError(
                f"{self.path} is truncated or damaged: at byte {self.position} it announces {count} {what}, "
                f"and {left} bytes are left"
            )

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self, what: str) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {what} is not UTF-8 ({data[:40]!r}): the file is damaged") from error

    def value(self, type: int, key: str) -> Any:
        if type == STRING:
            return self.string(key)
        if type == ARRAY:
            return self._array(key)
        if type not in CODES:
            raise InputError(f"{self.path}: {key} has the unknown value type {type}")
        if type == SCALARS["bool"][0]:
            return self.number("B") != 0
        return self.number(CODES[type])

    def _array(self, key: str) -> Any:
        type, count = self.number("I"), self.number("Q")
        if type == STRING:
            self.expect(count, 8, f"strings of {key}")
            return [self.string(key) for _ in range(count)]
        if type not in CODES:
            raise InputError(f"{self.path}: {key} is an array of the unknown or nested type {type}")
        dtype = np.dtype("?" if CODES[type] == "?" else "<" + CODES[type])
        self.expect(count, dtype.itemsize, f"values of {key}")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pair(value: Value) -> bytes:
    kind = value.type.removesuffix("[]")
    number = STRING if kind == "str" else SCALARS[kind][0]
    if kind == value.type:
        return struct.pack("<I", number) + _packed(kind, [value.value])
    return struct.pack("<IIQ", ARRAY, number, len(value.value)) + _packed(kind, value.value)


def _packed(kind: str, values: Sequence[Any]) -> bytes:
    if kind == "str":
        return b"".join(map(_string, values))
    return struct.pack(f"<{len(values)}{SCALARS[kind][1]}", *values)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


__all__ = ["Blob", "Container", "TensorEntry", "Value", "tensor_type", "write_container"]
