"""What a baseline keeps of the reference's logits: whole rows, or the part of each row that decides most.

A `TopRows` keeps of a row with V logits

- the `TOP` largest with their ids, and the log-sum-exp of all: log-probabilities of these ids are exact;
- the logits of `SAMPLE` ids that are evenly spread over the vocabulary: with the top they estimate every sum over the
  row (stratified: the top exactly, the rest from the sample), so that a fault far below the top is seen;
- mean and Euclidean norm of the whole row: offset and norm ratio are exact;
- where the task restricts the answer, the same top, sample and log-sum-exp among the ids that it can hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOP = 256
SAMPLE = 256

Float64 = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FullRows:
    """positions: int64[n] in the prompt. logits: float32[n, V]."""

    positions: Ids
    logits: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Top:
    """The largest logits of n rows among some ids, or all of them where there are fewer than `TOP`.

    ids: int64[n, K], by falling logit, ties by rising id. logits: float32[n, K]. log_normaliser: float64[n],
    log-sum-exp of the logits of all of these ids, not only of the top. count: how many these ids are. sample_ids:
    int64[S], ascending, evenly spread over these ids. sample: float32[n, S].
    """

    ids: Ids
    logits: NDArray[np.float32]
    log_normaliser: Float64
    count: int
    sample_ids: Ids
    sample: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TopRows:
    """n rows in part. positions: int64[n]. top: of the whole vocabulary. allowed: of the possible ids, or None.

    mean, norm: float64[n], of the whole rows.
    """

    positions: Ids
    top: Top
    allowed: Top | None
    mean: Float64
    norm: Float64


ReferenceRows = FullRows | TopRows


def best_ids(row: NDArray[np.floating], count: int) -> Ids:
    """Indices of the `count` largest of a row [R] (or all), best first; ties go to the lowest index."""
    count = min(count, len(row))
    threshold = np.partition(row, len(row) - count)[len(row) - count]
    above = np.flatnonzero(row > threshold)
    chosen = np.concatenate([above, np.flatnonzero(row == threshold)[: count - len(above)]])
    return chosen[np.lexsort((chosen, -row[chosen]))]


def log_sum_exp(row: Float64) -> float:
    """log of the sum of exp of a row float64[R]."""
    highest = row.max()
    return float(highest + np.log(np.exp(row - highest).sum()))


def stratified(top: Top, index: int) -> tuple[Ids, Float64, Float64]:
    """Ids, reference logits and weights: the top counts once, the sample for everything below the top."""
    below = ~np.isin(top.sample_ids, top.ids[index])
    ids = np.concatenate([top.ids[index], top.sample_ids[below]])
    logits = np.concatenate([top.logits[index], top.sample[index, below]]).astype(np.float64)
    kept, sampled = top.ids.shape[1], int(below.sum())
    weight = (top.count - kept) / sampled if sampled else 0.0
    return ids, logits, np.concatenate([np.ones(kept), np.full(sampled, weight)])


def spread_sample(size: int) -> Ids:
    """int64[S], ascending: `SAMPLE` indices evenly spread over [0, size), or all of them."""
    count = min(SAMPLE, size)
    return (np.arange(count) * 2 + 1) * size // (2 * count)


def keep_top(logits: NDArray[np.float32], positions: Ids, candidates: Ids | None) -> TopRows:
    """What is kept of whole rows float32[n, V]. candidates: int64[R], ids that an answer can hold, or None."""
    moments = [(row.mean(), np.sqrt(row @ row)) for row in (each.astype(np.float64) for each in logits)]
    mean, norm = np.asarray(moments, np.float64).reshape(-1, 2).T
    return TopRows(
        positions=np.asarray(positions, np.int64),
        top=_top(logits, None),
        allowed=None if candidates is None else _top(logits, candidates),
        mean=mean,
        norm=norm,
    )


def _top(logits: NDArray[np.float32], candidates: Ids | None) -> Top:
    count = logits.shape[1] if candidates is None else len(candidates)
    kept = min(TOP, count)
    ids = np.empty((len(logits), kept), np.int64)
    best = np.empty((len(logits), kept), np.float32)
    normaliser = np.empty(len(logits), np.float64)
    for index, whole in enumerate(logits):
        row = whole if candidates is None else whole[candidates]
        order = best_ids(row, kept)
        ids[index] = order if candidates is None else candidates[order]
        best[index] = row[order]
        normaliser[index] = log_sum_exp(row.astype(np.float64))
    sample_ids = spread_sample(count)
    if candidates is not None:
        sample_ids = candidates[sample_ids]
    return Top(ids, best, normaliser, count, sample_ids, np.ascontiguousarray(logits[:, sample_ids]))
