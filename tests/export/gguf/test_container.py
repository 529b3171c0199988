"""The container against gguf-py in both directions, and every lie that a header can tell."""

import os
import struct

import gguf
import numpy as np
import pytest
import torch

from bitnet.errors import InputError
from bitnet.export.gguf.container import Blob, Container, Value, write_container
from bitnet.export.gguf.types import TYPES

PAIRS = {
    "general.architecture": Value("str", "llama"),
    "a.count": Value("u32", 7),
    "a.share": Value("f32", 0.25),
    "a.flag": Value("bool", True),
    "a.words": Value("str[]", ["", "Grüße", "🙂 x"]),
    "a.kinds": Value("i32[]", [1, -3, 2**31 - 1]),
}


def blob(name="w", shape=(3, 5), kind="F32", data=None) -> Blob:
    values = torch.arange(TYPES[kind].size(shape), dtype=torch.int32).to(torch.uint8) if data is None else data
    return Blob(name, shape, TYPES[kind], lambda: values)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def header(tensors=0, pairs=0, *, magic=b"GGUF", version=3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def entry(name="w", shape=(8,), kind=0, offset=0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def refused(path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    with pytest.raises(InputError, match=match):
        Container(path)


def test_gguf_py_reads_what_is_written(tmp_path):
    matrix = torch.randn(3, 40)
    blobs = [
        blob("m", (3, 40), "F32", matrix.view(torch.uint8)),
        blob("t", (2, 256), "TQ2_0"),
        blob("s", (1,), "F32"),
    ]
    write_container(tmp_path / "x.gguf", PAIRS, blobs)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    for key, value in PAIRS.items():
        assert found[key] == value.value, key
    tensors = {each.name: each for each in reader.tensors}
    assert list(tensors) == ["m", "t", "s"]
    np.testing.assert_array_equal(tensors["m"].data, matrix.numpy())
    assert tensors["t"].tensor_type == gguf.GGMLQuantizationType.TQ2_0
    np.testing.assert_array_equal(tensors["t"].data.reshape(-1), blobs[1].data().numpy())
    assert all(each.data_offset % 32 == 0 for each in reader.tensors)


@pytest.mark.parametrize("alignment", [32, 64])
def test_what_gguf_py_writes_is_read(tmp_path, alignment):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_uint64("big", 2**40)
    writer.add_int16("small", -5)
    writer.add_float64("wide", 0.1)
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("words", ["a", "ü"])
    writer.add_bool("no", False)
    one, two = np.arange(7, dtype=np.float32), np.arange(64, dtype=np.float16).reshape(2, 32)
    writer.add_tensor("one", one)
    writer.add_tensor("two", two)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = Container(tmp_path / "x.gguf")
    assert file.integer("big") == 2**40
    assert file.pairs["small"] == -5
    assert file.number("wide") == 0.1
    assert file.pairs["floats"].tolist() == [0.5, 1.5]
    assert file.pairs["words"] == ["a", "ü"]
    assert file.pairs["no"] is False
    assert [(each.shape, each.type.name) for each in file.tensors.values()] == [((7,), "F32"), ((2, 32), "F16")]
    assert file.bytes("one").view(torch.float32).tolist() == one.tolist()
    assert file.bytes("two").view(torch.float16).tolist() == two.reshape(-1).tolist()


def test_what_is_read_cannot_change_the_file(tmp_path):
    write_container(tmp_path / "x.gguf", PAIRS, [blob()])
    before = (tmp_path / "x.gguf").read_bytes()
    Container(tmp_path / "x.gguf").bytes("w").fill_(7)
    assert (tmp_path / "x.gguf").read_bytes() == before


def test_only_one_tensors_bytes_exist_at_a_time(tmp_path):
    alive, most = [], []

    def data():
        values = torch.zeros(1024, dtype=torch.uint8)
        alive[:] = [each for each in alive if each() is not None]
        import weakref

        alive.append(weakref.ref(values))
        most.append(sum(each() is not None for each in alive))
        return values

    write_container(tmp_path / "x.gguf", PAIRS, [Blob(f"w{i}", (256,), TYPES["F32"], data) for i in range(5)])
    assert max(most) <= 2  # the one just made, and the loop's last


def test_other_files_are_refused_by_what_they_begin_with(tmp_path):
    path = tmp_path / "x.gguf"
    refused(path, b"", "0 bytes long")
    refused(path, b"GGUF", "4 bytes long")
    refused(path, header(magic=b"\x08\0\0\0"), "no GGUF file")
    refused(path, header(version=2), "version 2")
    refused(path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian")
    with pytest.raises(InputError, match="expected a GGUF file"):
        Container(tmp_path)


@pytest.mark.parametrize("count", [2**31, 2**50, 2**64 - 1])
def test_counts_beyond_the_file_are_refused_at_once(tmp_path, count):
    path, key = tmp_path / "x.gguf", string("general.alignment")
    refused(path, header(pairs=count) + bytes(64), "announces .* key-value pairs")
    refused(path, header(tensors=count) + bytes(64), "announces .* tensors")
    refused(path, header(pairs=1) + struct.pack("<Q", count) + bytes(64), "announces .* bytes")
    refused(path, header(pairs=1) + key + struct.pack("<IQ", 8, count) + bytes(64), "announces")
    for type in (0, 5, 6, 8, 12):  # arrays
        refused(path, header(pairs=1) + key + struct.pack("<IIQ", 9, type, count) + bytes(64), "announces")
    refused(path, header(tensors=1) + entry(shape=(count,)) + bytes(64), "cannot lie in")
    refused(path, header(tensors=1) + entry(shape=(2**16, 2**16, 2**16, 2**16)) + bytes(64), "cannot lie in")


def test_values_of_unknown_types_and_nested_arrays_are_refused(tmp_path):
    path, key = tmp_path / "x.gguf", string("k")
    refused(path, header(pairs=1) + key + struct.pack("<I", 13) + bytes(64), "unknown value type 13")
    refused(path, header(pairs=1) + key + struct.pack("<IIQ", 9, 9, 2) + bytes(64), "nested")
    refused(path, header(pairs=1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(64), "not UTF-8")
    refused(path, header(pairs=2) + (key + struct.pack("<II", 4, 1)) * 2 + bytes(64), "'k' twice")


def test_tensors_that_contradict_the_file_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    refused(path, header(1) + entry(kind=99) + bytes(64), "type number 99")
    refused(path, header(1) + entry(shape=(1,) * 5) + bytes(64), "5 dimensions")
    refused(path, header(1) + entry(shape=(0,)) + bytes(64), "cannot lie")
    refused(path, header(1) + entry(offset=4) + bytes(128), "overlap or leave gaps")
    refused(path, header(1) + entry(offset=32) + bytes(128), "overlap or leave gaps")
    refused(path, header(2) + entry("a") + entry("b") + bytes(256), "overlap or leave gaps")
    refused(path, header(2) + entry("a") + entry("a", offset=32) + bytes(256), "tensor a twice")
    refused(path, header(1) + entry(shape=(2, 100), kind=35) + bytes(4096), "no multiple of 256")
    alignment = string("general.alignment")
    for value in (0, 3, 33, 2**20):
        refused(path, header(1, 1) + alignment + struct.pack("<II", 4, value) + entry() + bytes(128), "power of two")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_container(tmp_path / "x.gguf", PAIRS, [blob("a", (4, 8)), blob("b", (2, 256), "TQ2_0")])
    whole, path = (tmp_path / "x.gguf").read_bytes(), tmp_path / "cut.gguf"
    Container(tmp_path / "x.gguf")
    for length in [*range(0, len(whole) - 64, 7), len(whole) - 32]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            Container(path)


def test_any_damaged_byte_of_the_header_is_refused_or_read_and_never_more(tmp_path):
    write_container(tmp_path / "x.gguf", PAIRS, [blob("a", (4, 8)), blob("b", (2, 256), "TQ2_0")])
    whole, path = (tmp_path / "x.gguf").read_bytes(), tmp_path / "bad.gguf"
    for at in range(0, len(whole) - 300):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            Container(path)
        except InputError:
            continue


def test_a_name_longer_than_ggmls_is_refused(tmp_path):
    with pytest.raises(InputError, match="at most 63 bytes"):
        write_container(tmp_path / "x.gguf", PAIRS, [blob("n" * 64)])


def test_values_of_the_wrong_kind_are_refused_with_their_key(tmp_path):
    write_container(tmp_path / "x.gguf", {**PAIRS, "a.low": Value("i32", -1)}, [blob()])
    file = Container(tmp_path / "x.gguf")
    for call in (
        lambda: file.integer("a.share"),
        lambda: file.integer("a.words"),
        lambda: file.integer("a.low"),
        lambda: file.text("a.count"),
        lambda: file.number("a.missing"),
        lambda: file.integer("a.flag"),
    ):
        with pytest.raises(InputError, match=r"x\.gguf: .*a\."):
            call()
    assert file.text("a.missing", "else") == "else"
    assert os.fspath(file.path).endswith("x.gguf")
