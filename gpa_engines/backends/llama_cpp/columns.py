"""From a row of a file's logits to the columns that a request wants."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

MAX_RUNS = 64
"""Up to so many contiguous runs are copied one by one, more by index."""


class Columns:
    """Which of a file's rows of the vocabulary go where.

    sources, targets: int64[n], ascending: result[targets] = logits[sources], and -inf elsewhere. width: of the result.
    """

    def __init__(self, sources: NDArray[np.int64], targets: NDArray[np.int64], width: int) -> None:
        self.width = width
        self._sources, self._targets = sources, targets
        self._partial = len(targets) < width
        breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(targets) != 1)) + 1
        self._runs = None if len(breaks) >= MAX_RUNS else list(_runs(sources, targets, breaks))

    def select(self, rows: Iterable[NDArray[np.float32]], count: int) -> NDArray[np.float32]:
        """`count` rows of logits -> float32[count, width], a copy."""
        result = np.empty((count, self.width), np.float32)
        if self._partial:
            result.fill(-np.inf)
        for row, target in zip(rows, result, strict=True):
            if self._runs is None:
                target[self._targets] = row[self._sources]
            else:
                for source_part, target_part in self._runs:
                    target[target_part] = row[source_part]
        return result


def _runs(
    sources: NDArray[np.int64], targets: NDArray[np.int64], breaks: NDArray[np.int64]
) -> Iterable[tuple[slice, slice]]:
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(sources)], strict=True):
        source, target, length = int(sources[start]), int(targets[start]), stop - start
        yield slice(source, source + length), slice(target, target + length)
