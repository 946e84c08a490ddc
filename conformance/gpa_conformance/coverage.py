"""Engines that hold a part of the vocabulary: reference and answer are compared over the ids that the engine has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpa_conformance.reference_rows import FullRows, ReferenceRows, Top, TopRows, stratified
from gpa_engines.engine import EngineInfo

Ids = NDArray[np.int64]


def covered_ids(info: EngineInfo) -> Ids | None:
    """int64[R], ascending: the ids that an engine has logits of; None for the whole vocabulary."""
    if info.logit_ids is None:
        return None
    return np.concatenate([np.arange(part.start, part.stop, dtype=np.int64) for part in info.logit_ids])


def comparable(block: ReferenceRows, covered: Ids, candidates: Ids | None) -> Ids | None:
    """int64[R]: the columns over which a block can be compared, or None where it does not hold them.

    Whole rows can be cut anywhere; of rows in part, what was kept among a task's candidates can be used where the
    engine has all of these.
    """
    if isinstance(block, FullRows):
        return covered
    if block.allowed is None or candidates is None or not np.isin(candidates, covered).all():
        return None
    return candidates


def cut_block(block: ReferenceRows, columns: Ids) -> ReferenceRows:
    """The reference's rows over `columns`, as if these were the whole vocabulary (see `comparable`)."""
    if isinstance(block, FullRows):
        return FullRows(block.positions, block.logits[:, columns])
    assert block.allowed is not None
    kept = block.allowed
    moments = []
    for index in range(len(block.positions)):
        _, logits, weights = stratified(kept, index)
        moments.append(((weights * logits).sum() / kept.count, np.sqrt((weights * logits * logits).sum())))
    mean, norm = np.asarray(moments, np.float64).reshape(-1, 2).T
    top = Top(
        np.searchsorted(columns, kept.ids),
        kept.logits,
        kept.log_normaliser,
        kept.count,
        np.searchsorted(columns, kept.sample_ids),
        kept.sample,
    )
    return TopRows(block.positions, top, None, mean, norm)
