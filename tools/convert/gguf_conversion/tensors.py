"""Tensors of safetensors files as NumPy arrays, and their encodings in GGUF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from gpa_codecs.errors import CheckpointError
from gpa_engines.backends.llama_cpp.gguf_file import BLOCKS, GgufTensor

STORED_DTYPES = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
"""safetensors' names of the dtypes that are read -> what NumPy reads their bytes as; it has no bfloat16."""

SIMPLE_TYPES = ("F32", "F16", "BF16", "Q8_0")
"""What NumPy can encode; the others need llama.cpp."""

_BLOCK_ELEMENTS = 1 << 22  # 16 MiB of float32 at a time


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file. offset: of its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def read(self, rows: range | None = None) -> NDArray[np.float32]:
        """All of it, or some rows (the first axis), in float32. Raises CheckpointError for NaN and infinity."""
        stored = STORED_DTYPES[self.dtype]
        rows = range(self.shape[0]) if rows is None else rows
        width = prod(self.shape[1:])
        with self.path.open("rb") as file:
            file.seek(self.offset + rows.start * width * stored.itemsize)
            raw = np.fromfile(file, stored, len(rows) * width).reshape(len(rows), *self.shape[1:])
        values = (raw.astype("<u4") << 16).view("<f4") if self.dtype == "BF16" else raw.astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: {self.name} holds NaN or infinity; the checkpoint is damaged")
        return values

    def read_ranges(self, ranges: Sequence[range]) -> NDArray[np.float32]:
        """The rows of several ranges, one after the other."""
        parts = [self.read(rows) for rows in ranges]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def row_blocks(shape: Sequence[int], ranges: Sequence[range] = ()) -> Iterator[range]:
    """The rows of a tensor, or those of some ranges of them, in pieces that take little memory."""
    step = max(1, _BLOCK_ELEMENTS // max(1, prod(shape[1:])))
    for rows in ranges or (range(shape[0]),):
        for start in range(rows.start, rows.stop, step):
            yield range(start, min(start + step, rows.stop))


def encode(values: NDArray[np.float32], tensor_type: str, name: str) -> NDArray[np.generic]:
    """float32 [R, C] or [C] as one of SIMPLE_TYPES: float32, float16, or uint8 with the bytes of each row.

    The encodings are gguf's, which are llama.cpp's. Raises CheckpointError for values beyond float16.
    """
    if tensor_type == "F16" and (largest := float(np.abs(values).max(initial=0.0))) >= 65520:
        raise CheckpointError(f"{name} holds {largest:g}, beyond float16's 65504; choose --outtype bf16 or f32")
    return quantize(values, GGMLQuantizationType[tensor_type])


def encoded_shape(shape: Sequence[int], tensor_type: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of what `encode` returns."""
    if tensor_type in ("F32", "F16"):
        return tuple(shape), np.dtype(np.float32 if tensor_type == "F32" else np.float16)
    elements, nbytes = BLOCKS[tensor_type]
    return (*shape[:-1], shape[-1] // elements * nbytes), np.dtype(np.uint8)


def decode(path: Path, tensor: GgufTensor, rows: range) -> NDArray[np.float32]:
    """Rows of a tensor of a GGUF file in float32; of a vector, elements."""
    elements, nbytes = BLOCKS[tensor.type]
    width = prod(tensor.shape[1:]) // elements * nbytes if len(tensor.shape) > 1 else nbytes
    with path.open("rb") as file:
        file.seek(tensor.offset + rows.start * width)
        raw = np.fromfile(file, np.uint8, len(rows) * width).reshape(len(rows), width)
    if tensor.type in ("F32", "F16"):
        values = raw.view("<f4" if tensor.type == "F32" else "<f2").astype(np.float32)
    else:
        values = dequantize(raw, GGMLQuantizationType[tensor.type])
    return values.reshape(len(rows), *tensor.shape[1:])
