"""The header of a GGUF file, read in pure Python and checked before llama.cpp sees the file.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: the magic "GGUF", a version, the
numbers of tensors and of metadata entries, the entries (key, type, value), the tensors' names, shapes, types and
offsets, padding, the tensors' data. llama.cpp stops the whole process at some damaged files; here each is a
CheckpointError.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""They differ in nothing that a little-endian file shows."""

BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
}
"""Tensor type -> (elements, bytes) of one block; a row is a whole number of blocks (ggml's type traits)."""

# ggml's numbers of the types, metadata value types as struct reads them, and the two composite ones.
_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K"}
_TYPES |= {12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 30: "BF16"}
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9

_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_SMALL_ARRAY = 1024  # elements; longer arrays (tokens, merges) are decoded on request
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A stored tensor. shape: as NumPy has it, rows first. offset, nbytes: of its data in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufArray:
    """A long array that stays in the file: number of elements, where they are, and their type in the format."""

    count: int
    offset: int
    end: int
    type: int


Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str] | GgufArray


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says before its data. metadata: values by key; long arrays as GgufArray. size: of the file."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    data_offset: int
    size: int

    def text(self, key: str) -> str:
        """A string of the metadata. Raises CheckpointError when it is missing or no string, as all below."""
        value = self._get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def integer(self, key: str) -> int:
        """An integer of at least 0."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(key, "an integer of at least 0")
        return value

    def number(self, key: str) -> float:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        return float(value)

    def numbers(self, key: str) -> NDArray[np.generic]:
        """An array of numbers, of any length."""
        value = self._get(key)
        if isinstance(value, GgufArray) and value.type in _SCALARS:
            with self.path.open("rb") as file:
                file.seek(value.offset)
                return np.frombuffer(file.read(value.end - value.offset), _SCALARS[value.type])
        if isinstance(value, list) and not any(isinstance(item, str) for item in value):
            return np.asarray(value)
        raise self._wrong(key, "an array of numbers")

    def byte_strings(self, key: str) -> list[bytes]:
        """An array of strings, of any length, not decoded."""
        value = self._get(key)
        if isinstance(value, GgufArray) and value.type == _STRING:
            with self.path.open("rb") as file:
                file.seek(value.offset)
                return _split_strings(file.read(value.end - value.offset), value.count)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return [str(item).encode() for item in value]
        raise self._wrong(key, "an array of strings")

    def count(self, key: str) -> int:
        """Number of elements of an array."""
        value = self._get(key)
        if isinstance(value, GgufArray):
            return value.count
        if isinstance(value, list):
            return len(value)
        raise self._wrong(key, "an array")

    def _get(self, key: str) -> Value:
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: the metadata has no {key}; convert the checkpoint again")
        return self.metadata[key]

    def _wrong(self, key: str, expected: str) -> CheckpointError:
        shown = repr(self.metadata[key])
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return CheckpointError(f"{self.path}: {key} is {shown}; expected {expected}; convert the checkpoint again")


def gguf_files(folder: Path) -> Iterator[Path]:
    """GGUF files of a model: in its folder and in the folder gguf inside it."""
    for place in (folder, folder / "gguf"):
        if place.is_dir():
            yield from sorted(place.glob("*.gguf"))


def read_header(path: str | Path) -> GgufHeader:
    """Read and check a file's header; no tensor is read.

    Raises CheckpointError for a file that is missing, foreign, of an unsupported version, damaged, or shorter than its
    header says.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(24)
            if start[:4] != MAGIC:
                raise CheckpointError(f"{path} is no GGUF file: it begins with {start[:4]!r}; expected {MAGIC!r}")
            if len(start) < 24:
                raise CheckpointError(f"{path} is truncated: {size} bytes; copy or convert it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def tensor_bytes(shape: tuple[int, ...], tensor_type: str) -> int:
    """Bytes of a tensor of that shape (rows first) and type; the row must be a whole number of blocks."""
    elements, nbytes = BLOCKS[tensor_type]
    return prod(shape) // elements * nbytes


class _Cursor:
    """Reads one thing after the other and stops at the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def take(self, count: int, what: str) -> int:
        """Move on by `count` bytes and return where they begin."""
        if count > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: {what} runs past the end of the file ({len(self.data)} bytes); "
                "copy or convert it again"
            )
        start = self.at
        self.at += count
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.take(8, what))[0]

    def string(self, what: str) -> str:
        length = self.u64(what)
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is damaged: {what} is not UTF-8; convert it again") from error


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(path, data)
    cursor.at = len(MAGIC)
    version = cursor.u32("the version")
    if version not in VERSIONS:
        kind = "a big-endian file" if version.to_bytes(4, "big") in {_U32.pack(v) for v in VERSIONS} else "unsupported"
        raise CheckpointError(f"{path}: GGUF version {version} is {kind}; expected little-endian version 2 or 3")
    tensor_count, entry_count = cursor.u64("the number of tensors"), cursor.u64("the number of metadata entries")
    # The smallest entry has 13 bytes, the smallest tensor 32: counts beyond that are absurd, whatever follows.
    if 13 * entry_count + 32 * tensor_count > len(data):
        raise CheckpointError(
            f"{path} is damaged: it announces {tensor_count} tensors and {entry_count} metadata entries in "
            f"{len(data)} bytes; copy or convert it again"
        )
    metadata: dict[str, Value] = {}
    for number in range(entry_count):
        key = cursor.string(f"metadata key {number}")
        if key in metadata:
            raise CheckpointError(f"{path} is damaged: the metadata has {key} twice; convert it again")
        metadata[key] = _value(cursor, key)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path} is damaged: general.alignment is {alignment!r}; expected a power of two")
    announced = [_announced_tensor(cursor, number) for number in range(tensor_count)]
    data_offset = _padded(cursor.at, alignment)
    tensors: dict[str, GgufTensor] = {}
    expected = 0
    for tensor in announced:
        if tensor.name in tensors:
            raise CheckpointError(f"{path} is damaged: it has the tensor {tensor.name} twice; convert it again")
        if tensor.offset != expected:
            raise CheckpointError(
                f"{path} is damaged: {tensor.name} is at offset {tensor.offset}; expected {expected}; convert it again"
            )
        end = data_offset + tensor.offset + tensor.nbytes
        if end > len(data):
            raise CheckpointError(
                f"{path} is truncated: {tensor.name} ends at byte {end}, the file at {len(data)}; "
                "copy or convert it again"
            )
        expected = _padded(tensor.offset + tensor.nbytes, alignment)
        start = data_offset + tensor.offset
        tensors[tensor.name] = GgufTensor(tensor.name, tensor.shape, tensor.type, start, tensor.nbytes)
    return GgufHeader(path, version, metadata, tensors, data_offset, len(data))


def _value(cursor: _Cursor, key: str) -> Value:
    kind = cursor.u32(key)
    if kind == _STRING:
        return cursor.string(key)
    if kind == _ARRAY:
        return _array(cursor, key)
    return _scalars(cursor, key, kind, 1)[0].item()


def _array(cursor: _Cursor, key: str) -> Value:
    kind, count = cursor.u32(key), cursor.u64(key)
    start = cursor.at
    if kind != _STRING:
        values = _scalars(cursor, key, kind, count)
        return values.tolist() if count <= _SMALL_ARRAY else GgufArray(count, start, cursor.at, kind)
    if count <= _SMALL_ARRAY:
        return [cursor.string(key) for _ in range(count)]
    _skip_strings(cursor, key, count)
    return GgufArray(count, start, cursor.at, kind)


def _scalars(cursor: _Cursor, key: str, kind: int, count: int) -> NDArray[np.generic]:
    if kind not in _SCALARS:
        raise CheckpointError(f"{cursor.path} is damaged: {key} is of the unknown type {kind}; convert it again")
    dtype = np.dtype(_SCALARS[kind])
    start = cursor.take(dtype.itemsize * count, key)
    # A copy: a view of the map would keep it from being closed.
    return np.frombuffer(cursor.data[start : cursor.at], dtype) if count else np.empty(0, dtype)


def _skip_strings(cursor: _Cursor, key: str, count: int) -> None:
    data, size, at, unpack = cursor.data, len(cursor.data), cursor.at, _U64.unpack_from
    for _ in range(count):
        if at + 8 > size:
            at = size + 1
            break
        at += 8 + unpack(data, at)[0]
    cursor.take(at - cursor.at, key)


def _split_strings(content: bytes, count: int) -> list[bytes]:
    strings, at, unpack = [], 0, _U64.unpack_from
    for _ in range(count):
        length = unpack(content, at)[0]
        strings.append(content[at + 8 : at + 8 + length])
        at += 8 + length
    return strings


def _announced_tensor(cursor: _Cursor, number: int) -> GgufTensor:
    """A tensor whose offset still counts from the beginning of the data."""
    name = cursor.string(f"the name of tensor {number}")
    dimensions = cursor.u32(name)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise CheckpointError(f"{cursor.path} is damaged: {name} has {dimensions} dimensions; expected 1 to 4")
    shape = tuple(cursor.u64(name) for _ in range(dimensions))[::-1]
    kind, offset = cursor.u32(name), cursor.u64(name)
    if kind not in _TYPES:
        raise CheckpointError(f"{cursor.path}: {name} is of ggml type {kind}; expected one of {', '.join(BLOCKS)}")
    tensor_type = _TYPES[kind]
    if prod(shape) == 0 or shape[-1] % BLOCKS[tensor_type][0]:
        raise CheckpointError(
            f"{cursor.path} is damaged: {name} has shape {shape}; {tensor_type} rows are multiples of "
            f"{BLOCKS[tensor_type][0]}"
        )
    return GgufTensor(name, shape, tensor_type, offset, tensor_bytes(shape, tensor_type))


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
