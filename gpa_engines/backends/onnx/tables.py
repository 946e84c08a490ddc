"""The embedding table and the head's weight: mapped files, of which only the rows in use are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import CheckpointError


class Table:
    """One row of `hidden` numbers per id, in float32, float16 or 8 bits with a scale per block.

    path: [V, hidden], or int8[hidden, V] with scales: float32[hidden / block, V]. Raises CheckpointError for arrays of
    another shape or type.
    """

    def __init__(self, path: Path, scales: Path | None, vocab_size: int, hidden: int) -> None:
        self._values = _map(path)
        self._scales = None if scales is None else _map(scales)
        shape = (vocab_size, hidden) if scales is None else (hidden, vocab_size)
        kinds = (np.float32, np.float16) if scales is None else (np.int8,)
        if self._values.shape != shape or self._values.dtype not in kinds:
            expected = " or ".join(np.dtype(kind).name for kind in kinds)
            raise CheckpointError(
                f"{path} is {self._values.dtype}{list(self._values.shape)}; expected {expected}{list(shape)}: "
                "convert again"
            )
        if self._scales is not None:
            blocks = self._scales.shape[0] if self._scales.ndim == 2 else 0
            if self._scales.dtype != np.float32 or self._scales.shape[1:] != shape[1:] or not blocks or hidden % blocks:
                raise CheckpointError(
                    f"{scales} is {self._scales.dtype}{list(self._scales.shape)}, which does not go with {path}: "
                    "convert again"
                )

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[len(ids), hidden], a copy."""
        if self._scales is None:
            return self._values[ids].astype(np.float32, copy=False)
        first, last = int(ids[0]), int(ids[-1])
        # A run of ids is a slice, which is many times faster than single columns.
        columns = slice(first, last + 1) if last - first + 1 == len(ids) and (np.diff(ids) == 1).all() else ids
        values, scales = self._values[:, columns], self._scales[:, columns]
        blocks = values.reshape(len(scales), -1, values.shape[1])
        return np.ascontiguousarray((blocks * scales[:, None]).reshape(values.shape).T)

    def whole(self) -> NDArray[np.float32]:
        """float32[V, hidden]: the mapped file itself where that is what it holds."""
        if self._values.dtype == np.float32:
            return self._values
        count = self._values.shape[0] if self._scales is None else self._values.shape[1]
        return self.rows(np.arange(count))


def _map(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; convert again") from error
