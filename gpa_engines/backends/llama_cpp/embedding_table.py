"""The embedding table beside speech and text GGUFs: prompts go in as its rows.

One safetensors file with the tensor `embeddings`, [V, hidden], float16 or float32, mapped and never read as a whole.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import CheckpointError
from gpa_codecs.weights import read_header

TENSOR = "embeddings"
FORMAT = "1"
"""Value of `gpa.format` in the table's own metadata."""

DTYPES = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


def table_metadata(source_sha256: str, tokenizer_sha256: str) -> dict[str, str]:
    """What a table says of itself; the digests are those of `gpa.source.sha256` and `gpa.tokenizer.sha256`."""
    return {"gpa.format": FORMAT, "gpa.source.sha256": source_sha256, "gpa.tokenizer.sha256": tokenizer_sha256}


def open_table(
    path: str | Path, *, shape: tuple[int, int], source_sha256: str, tokenizer_sha256: str
) -> NDArray[np.floating]:
    """The rows of all ids, float16 or float32 [V, hidden], mapped from the file; leave the file unchanged meanwhile.

    Raises CheckpointError for a file that is missing, damaged, of another shape, or of another checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: the embedding table that to_gguf.py wrote beside the GGUF; copy it there or convert "
            "again"
        )
    spec = read_header(path).get(TENSOR)
    if spec is None or spec.dtype not in DTYPES or spec.shape != shape:
        found = "nothing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
        raise CheckpointError(f"{path}: {TENSOR} is {found}; expected F16 or F32 {list(shape)}; convert again")
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    expected = table_metadata(source_sha256, tokenizer_sha256)
    metadata = header.get("__metadata__") or {}
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise CheckpointError(
                f"{path}: {key} is {metadata.get(key)!r}; the GGUF beside it has {value!r}: the table belongs to "
                "another conversion; convert again"
            )
    offset = 8 + length + header[TENSOR]["data_offsets"][0]
    return np.memmap(path, DTYPES[spec.dtype], "r", offset, shape)
