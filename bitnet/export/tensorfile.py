"""A safetensors file written tensor by tensor, so that no more than one is in memory beside the model.

The layout is safetensors' own (8 bytes: length of the header; the header, json padded with spaces; the tensors' bytes),
and so is the reader. The header comes first in the file and is known last: room for it is kept, and filled at the end.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitnet.errors import InputError

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
ENTRY = 150  # bytes of a header entry beside its name: dtype, shape, two offsets of up to 16 digits


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]], room: int) -> dict[str, int]:
    """Write ``tensors`` in the order they come; return the CRC-32 of each one's bytes.

    Args:
        room: bytes kept for the header; see `header_room`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # older transformers refuse a file without it
    checksums: dict[str, int] = {}
    position = 0
    room += -room % 8
    with open(path, "wb") as file:
        file.seek(8 + room)
        for name, tensor in tensors:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            shape = list(tensor.shape)
            header[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": shape,
                "data_offsets": [position, position + len(data)],
            }
            checksums[name] = zlib.crc32(data)
            file.write(data)
            position += len(data)
        written = json.dumps(header, separators=(",", ":")).encode()
        assert len(written) <= room, f"the header takes {len(written)} bytes, room was kept for {room}"
        file.seek(0)
        file.write(struct.pack("<Q", room) + written.ljust(room))
    return checksums


def header_room(names: Iterable[str]) -> int:
    """Bytes that the header of tensors of these names takes at most."""
    return 96 + sum(len(json.dumps(name)) + ENTRY for name in names)


class TensorFile:
    """A safetensors file, memory-mapped: a tensor's bytes are read when they are first used.

    Args:
        path: the file.
        checksums: CRC-32 by name; every tensor is compared with its own where it is taken. Empty: none are.

    Raises:
        InputError: no safetensors file, or a truncated one.
    """

    def __init__(self, path: Path, checksums: Mapping[str, int]) -> None:
        self._path, self._checksums = path, checksums
        try:
            self._file = safe_open(path, framework="pt")  # pyright: ignore[reportPrivateImportUsage]
            self.names = frozenset(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is no whole safetensors file: {error}") from error

    def take(self, name: str) -> Tensor:
        """The tensor of that name, not copied.

        Raises:
            InputError: there is none, or its bytes are not those that were written.
        """
        if name not in self.names:
            raise InputError(f"{self._path} lacks {name}: the file is of another version, or was changed")
        tensor = self._file.get_tensor(name)
        expected = self._checksums.get(name)
        if expected is not None and zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) != expected:
            raise InputError(f"{self._path}: the bytes of {name} are not those that were written: the file is damaged")
        return tensor
