"""What a baseline keeps of the reference's logits: whole rows, or the part of each row that decides most.

A `TopRows` keeps of a row with V logits

- the `TOP` largest with their ids, and the log-sum-exp of all: log-probabilities of these ids are exact;
- mean and Euclidean norm of the whole row: offset and norm ratio are exact;
- the logits of `SAMPLE` fixed ids, evenly spread over the vocabulary: with the top they estimate every sum over the row
  (stratified: the top exactly, the rest from the sample), so that a fault far below the top is seen;
- where the task restricts the answer, the same top and log-sum-exp among the allowed ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import GpaError

TOP = 256
SAMPLE = 256


@dataclass(frozen=True, slots=True)
class FullRows:
    """positions: int64[n] in the prompt. logits: float32[n, V]."""

    positions: NDArray[np.int64]
    logits: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Top:
    """The largest logits of n rows among some ids. ids: int64[n, K], by falling logit, ties by rising id.
    logits: float32[n, K]. log_normaliser: float64[n], log-sum-exp of all of these ids' logits, not only of the top."""

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    log_normaliser: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TopRows:
    """n rows in part. positions: int64[n]. top: of the whole vocabulary. allowed: of the allowed ids, or None.
    mean, norm: float64[n] of the whole rows. sample_ids: int64[S], ascending. sample: float32[n, S]."""

    positions: NDArray[np.int64]
    top: Top
    allowed: Top | None
    mean: NDArray[np.float64]
    norm: NDArray[np.float64]
    sample_ids: NDArray[np.int64]
    sample: NDArray[np.float32]


ReferenceRows = FullRows | TopRows
