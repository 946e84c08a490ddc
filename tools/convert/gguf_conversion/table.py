"""The embedding table beside speech and text GGUFs: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from gpa_codecs.errors import CheckpointError
from gpa_engines.backends.llama_cpp.embedding_table import DTYPES, TENSOR, open_table, table_metadata

from .tensors import StoredTensor, encode, row_blocks


@dataclass(frozen=True, slots=True)
class Table:
    """A table to write. dtype: "F16" or "F32". embeddings: where the rows come from."""

    path: Path
    dtype: str
    embeddings: StoredTensor
    source_sha256: str
    tokenizer_sha256: str

    @property
    def nbytes(self) -> int:
        return prod(self.embeddings.shape) * DTYPES[self.dtype].itemsize


def write_table(table: Table, path: Path, progress: Callable[[str, int], None]) -> None:
    """Write the table to `path`; progress is told the tensor's name and the bytes that were added.

    Raises OSError, and CheckpointError for values beyond float16.
    """
    with path.open("wb") as file:
        file.write(_header(table))
        for rows in row_blocks(table.embeddings.shape):
            content = encode(table.embeddings.read(rows), table.dtype, table.embeddings.name).tobytes()
            file.write(content)
            progress(TENSOR, len(content))


def is_table_of(table: Table) -> bool:
    """Whether the file is there already, whole, and says that it holds these embeddings."""
    try:
        _open(table, table.path)
    except CheckpointError:
        return False
    return True


def differing_rows(table: Table, path: Path) -> int:
    """How many rows of the file at `path` are not what the checkpoint has. Raises CheckpointError."""
    stored = _open(table, path)
    return sum(
        int((stored[rows.start : rows.stop] != table.embeddings.read(rows).astype(stored.dtype)).any(axis=1).sum())
        for rows in row_blocks(table.embeddings.shape)
    )


def _open(table: Table, path: Path) -> np.ndarray:
    rows, width = table.embeddings.shape
    stored = open_table(
        path, shape=(rows, width), source_sha256=table.source_sha256, tokenizer_sha256=table.tokenizer_sha256
    )
    if stored.dtype != DTYPES[table.dtype]:
        raise CheckpointError(f"{path} is {stored.dtype}; expected {DTYPES[table.dtype]}")
    return stored


def _header(table: Table) -> bytes:
    entry = {"dtype": table.dtype, "shape": list(table.embeddings.shape), "data_offsets": [0, table.nbytes]}
    metadata = table_metadata(table.source_sha256, table.tokenizer_sha256)
    text = json.dumps({"__metadata__": metadata, TENSOR: entry}, separators=(",", ":")).encode()
    # Rows begin at a multiple of 64 bytes, so that a mapped row is aligned.
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text
