"""GGUF headers: everything that is in a good file, and a clear error for everything that is no good file."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpa_codecs.errors import CheckpointError
from gpa_engines.backends.llama_cpp.gguf_file import BLOCKS, GgufArray, read_header, tensor_bytes

U32, U64, F32, STRING, ARRAY = 4, 10, 6, 8, 9


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(key: str, kind: int, content: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + content


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in reversed(shape))
    return string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


ENTRIES = (
    entry("general.architecture", STRING, string("qwen3")),
    entry("qwen3.block_count", U32, struct.pack("<I", 2)),
    entry("gpa.ids.starts", ARRAY, struct.pack("<IQ2I", U32, 2, 5, 70_000)),
    entry("tokens", ARRAY, struct.pack("<IQ", STRING, 3) + string("a") + string("") + string("声")),
)
TENSORS = (tensor("norm.weight", (6,), 0, 0), tensor("embd.weight", (3, 64), 8, 32))


def gguf(
    entries: tuple[bytes, ...] = ENTRIES,
    tensors: tuple[bytes, ...] = TENSORS,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 32 + 3 * 68,
) -> bytes:
    """A file of 6 float32 (24 bytes, padded to 32) and 3 rows of two Q8_0 blocks, unless told otherwise."""
    header = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(entries))))
    header += b"".join(entries) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def to_file(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return to_file


def test_reads_metadata_and_tensors(write: Callable[[bytes], Path]) -> None:
    header = read_header(write(gguf()))
    assert header.version == 3
    assert header.text("general.architecture") == "qwen3"
    assert header.integer("qwen3.block_count") == 2
    assert header.numbers("gpa.ids.starts").tolist() == [5, 70_000]
    assert header.byte_strings("tokens") == [b"a", b"", "声".encode()]
    norm, embeddings = header.tensors["norm.weight"], header.tensors["embd.weight"]
    assert (norm.shape, norm.type, norm.nbytes) == ((6,), "F32", 24)
    assert (embeddings.shape, embeddings.type, embeddings.nbytes) == ((3, 64), "Q8_0", 3 * 2 * 34)
    assert embeddings.offset == norm.offset + 32 == header.data_offset + 32
    assert header.size == embeddings.offset + embeddings.nbytes


def test_long_arrays_are_read_on_request_and_soon(write: Callable[[bytes], Path]) -> None:
    texts = b"".join(string(f"token {number}") for number in range(180_000))
    types = np.arange(180_000, dtype="<i4")
    arrays = (
        entry("tokens", ARRAY, struct.pack("<IQ", STRING, 180_000) + texts),
        entry("types", ARRAY, struct.pack("<IQ", 5, 180_000) + types.tobytes()),
    )
    path = write(gguf(arrays))
    started = time.perf_counter()
    header = read_header(path)
    assert time.perf_counter() - started < 1
    assert isinstance(header.metadata["tokens"], GgufArray)
    assert header.count("tokens") == 180_000
    assert header.byte_strings("tokens")[::179_999] == [b"token 0", b"token 179999"]
    np.testing.assert_array_equal(header.numbers("types"), types)


def test_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf", reason="the package that wrote the file")
    for kind, (elements, nbytes) in package.GGML_QUANT_SIZES.items():
        if kind.name in BLOCKS:
            assert BLOCKS[kind.name] == (elements, nbytes)
    writer = package.GGUFWriter(tmp_path / "a.gguf", "qwen3")
    writer.add_float32("eps", 1e-6)
    writer.add_bool("flag", True)
    writer.add_int64("far", -(2**40))
    writer.add_array("floats", [0.5, 2.0])
    writer.add_tensor("w", np.arange(256, dtype=np.float16).reshape(2, 128))
    writer.add_tensor("q", np.zeros((2, 144), np.uint8), raw_dtype=package.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "a.gguf")
    assert header.number("eps") == np.float32(1e-6)
    assert header.metadata["flag"] is True
    assert header.metadata["far"] == -(2**40)
    assert header.numbers("floats").tolist() == [0.5, 2.0]
    assert (header.tensors["q"].shape, header.tensors["q"].type) == ((2, 256), "Q4_K")
    stored = np.fromfile(tmp_path / "a.gguf", "<f2", 256, offset=header.tensors["w"].offset)
    np.testing.assert_array_equal(stored, np.arange(256))


def test_every_truncation_is_refused(write: Callable[[bytes], Path]) -> None:
    content = gguf()
    for length in range(len(content)):
        with pytest.raises(CheckpointError, match=r"truncated|damaged|no GGUF"):
            read_header(write(content[:length]))


def test_every_changed_byte_is_refused_or_harmless(write: Callable[[bytes], Path]) -> None:
    content = gguf()
    refused = 0
    for position in range(len(content) - 236):
        for value in (0x00, 0x7F, 0xFF):
            changed = content[:position] + bytes([value]) + content[position + 1 :]
            try:
                read_header(write(changed))
            except CheckpointError:
                refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gguf(magic=b"GGML"), "no GGUF file"),
        (b'{"model_type": "qwen3", "architectures": []}', "no GGUF file"),
        (gguf(version=1), "version 1"),
        (gguf(version=0x03000000), "big-endian"),
        (gguf(counts=(2**60, 4)), "announces"),
        (gguf(counts=(2, 2**63)), "announces"),
        (gguf((*ENTRIES, ENTRIES[0])), "twice"),
        (gguf(tensors=(TENSORS[0], tensor("norm.weight", (3, 64), 8, 32))), "twice"),
        (gguf((entry("x", ARRAY, struct.pack("<IQ", STRING, 2**62)),)), "past the end"),
        (gguf((entry("x", ARRAY, struct.pack("<IQ", U32, 2**62)),)), "past the end"),
        (gguf((entry("x", STRING, struct.pack("<Q", 2**64 - 1)),)), "past the end"),
        (gguf((entry("x", 13, bytes(8)),)), "unknown type 13"),
        (gguf((entry("x", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "unknown type 9"),
        (gguf((entry("general.alignment", U32, struct.pack("<I", 24)),)), "power of two"),
        (gguf(tensors=(tensor("w", (1,) * 5, 0, 0),)), "5 dimensions"),
        (gguf(tensors=(tensor("w", (2**40, 2**40), 0, 0),)), "truncated"),
        (gguf(tensors=(tensor("w", (2, 33), 8, 0),)), "multiples of 32"),
        (gguf(tensors=(tensor("w", (0, 32), 8, 0),)), "shape"),
        (gguf(tensors=(tensor("w", (2, 32), 39, 0),)), "ggml type 39"),
        (gguf(tensors=(TENSORS[0], tensor("w", (3, 64), 8, 0))), "offset 0"),
        (gguf(tensors=(tensor("w", (2, 32), 8, 2**63),)), "offset"),
        (gguf(data=100), "truncated"),
        (b"", "no GGUF file"),
    ],
)
def test_what_is_wrong_is_named(write: Callable[[bytes], Path], content: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_header(write(content))


def test_a_missing_file_a_missing_key_and_a_wrong_kind(write: Callable[[bytes], Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "nowhere.gguf")
    with pytest.raises(CheckpointError, match="directory"):
        read_header(tmp_path)
    header = read_header(write(gguf()))
    with pytest.raises(CheckpointError, match=r"no qwen3\.vocab_size"):
        header.integer("qwen3.vocab_size")
    for read in (header.integer, header.number, header.numbers, header.byte_strings, header.count):
        with pytest.raises(CheckpointError, match=r"general\.architecture is 'qwen3'; expected a"):
            read("general.architecture")


def test_tensor_bytes() -> None:
    assert tensor_bytes((2, 256), "Q6_K") == 420
    assert tensor_bytes((5,), "F32") == 20
