"""The language model's head over hidden states that a server gives: their product with the checkpoint's own matrix.

Mapped from the checkpoint and converted piece by piece, so that it takes no memory of its own.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import CheckpointError
from gpa_codecs.weights import read_header, weight_files
from gpa_engines.lm_config import LMConfig

EMBEDDINGS, HEAD = "embed_tokens.weight", "lm_head.weight"
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
BLOCK = 16384
"""Rows of the matrix that are float32 at a time, 32 MiB at the released size."""


class LMHead:
    """The head's matrix, [V, H], as stored; leave the file unchanged while this lives."""

    def __init__(self, stored: NDArray[np.generic], bfloat16: bool) -> None:
        self._stored = stored
        self._bfloat16 = bfloat16

    @classmethod
    def find(cls, folder: Path, config: LMConfig) -> LMHead | None:
        """That of a checkpoint folder, None where it holds no weights.

        Raises CheckpointError for a damaged file, and for a matrix that does not fit the config.
        """
        try:
            files = weight_files(folder)
        except CheckpointError:
            return None
        wanted = EMBEDDINGS if config.tie_word_embeddings else HEAD
        for path in files:
            if path.suffix != ".safetensors":
                return None
            for name, spec in read_header(path).items():
                if name == wanted or name.endswith("." + wanted):
                    expected = (config.vocab_size, config.hidden_size)
                    if spec.shape != expected or spec.dtype not in DTYPES:
                        raise CheckpointError(
                            f"{path}: {name} is {spec.dtype} {list(spec.shape)}; expected {list(expected)} in one of "
                            f"{', '.join(DTYPES)}"
                        )
                    stored = np.memmap(path, DTYPES[spec.dtype], "r", _offset(path, name), expected)
                    return cls(stored, spec.dtype == "BF16")
        raise CheckpointError(f"{folder} holds no tensor that ends in {wanted}; download the checkpoint again")

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[P, H] -> float32[P, V], unnormalised, computed in float32."""
        result = np.empty((len(hidden), len(self._stored)), np.float32)
        for start in range(0, len(self._stored), BLOCK):
            block = self._float32(self._stored[start : start + BLOCK])
            np.matmul(hidden, block.T, out=result[:, start : start + BLOCK])
        return result

    def _float32(self, block: NDArray[np.generic]) -> NDArray[np.float32]:
        if not self._bfloat16:
            return block.astype(np.float32)
        return (block.astype(np.uint32) << 16).view(np.float32)


def _offset(path: Path, name: str) -> int:
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
