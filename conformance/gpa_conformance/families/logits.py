"""Family "logits": the prefill of a prompt against the baseline's, every position of it.

The Ascend report's own four figures are given beside ours, per prompt and at its last position as that report does; its
limits were set for float32 and decide nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_conformance.baseline import LogitsReference
from gpa_conformance.cases import Case
from gpa_conformance.context import Context, Skip
from gpa_conformance.coverage import comparable, cut_block
from gpa_conformance.diagnosis import diagnose
from gpa_conformance.families import suspects
from gpa_conformance.families.findings import CONTRACT, Findings
from gpa_conformance.metrics import LogitsComparison, LogitsMetrics
from gpa_conformance.prompts import Prompt
from gpa_conformance.reference_rows import FullRows
from gpa_conformance.results import CaseResult
from gpa_conformance.wire import WrongShape

BLOCK = 32
"""Rows that are compared at a time."""

ASCEND = ("rel_l2", "cosine", "top1", "top5")


async def run(context: Context, case: Case) -> CaseResult:
    """Kinds: "prefill", and "suspect" (see :mod:`gpa_conformance.families.suspects`)."""
    context.need("logits")
    if case.kind == "suspect":
        return await suspects.run(context, case)
    return await run_prefill(context, case)


async def run_prefill(context: Context, case: Case) -> CaseResult:
    """Score every position of the prompt that the baseline holds."""
    found = Findings(case)
    prompt = context.prompt(case.id)
    reference = context.baseline.logits(case.id)
    try:
        rows = await context.rows(prompt.ids, reference.positions)
    except WrongShape as error:
        found.count("wrong_shape", [str(error)], CONTRACT)
        return found.result()
    metrics = _compare(context, prompt, reference, rows)
    summary = metrics.summary()
    found.metrics.update(summary)
    found.add(context.limits.checks(summary))
    found.plot(metrics.by_position())
    if "ascend" in case.spec:
        found.table("ascend", [_ascend_row(case, metrics)])
        found.table("ascend_all_positions", [_ascend_summary(case, summary)])
    if found.failed:
        found.complain(*diagnose(metrics, context.limits))
    return found.result()


def _compare(context: Context, prompt: Prompt, reference: LogitsReference, rows: NDArray[np.float32]) -> LogitsMetrics:
    """The engine's rows at the reference's positions, over the ids that both have."""
    candidates, columns = prompt.candidates(), None
    blocks = reference.blocks(BLOCK)
    if context.covered is not None:
        columns = comparable(next(reference.blocks(1)), context.covered, candidates)
        if columns is None:
            raise Skip("the baseline keeps too little of these rows for an engine with a part of the vocabulary")
        blocks = (cut_block(block, columns) for block in blocks)
        candidates = None if candidates is None else np.flatnonzero(np.isin(columns, candidates))
    comparison = LogitsComparison(candidates if candidates is not None and len(candidates) else None)
    done = 0
    for block in blocks:
        given = rows[done : done + len(block.positions)]
        comparison.add(block, given if columns is None else given[:, columns])
        done += len(given)
    return comparison.result()


def _ascend_row(case: Case, metrics: LogitsMetrics) -> dict[str, Any]:
    """The report's four figures at the last position."""
    return {"prompt": _text(case)} | {name: float(metrics.series[name][-1]) for name in ASCEND}


def _ascend_summary(case: Case, summary: dict[str, float]) -> dict[str, Any]:
    """The same over all positions."""
    return {"prompt": _text(case), "positions": summary["positions"]} | {name: summary[name] for name in ASCEND}


def _text(case: Case) -> str:
    assert case.prompt is not None
    return case.prompt["text"]


def compare_rows(reference: Sequence[np.ndarray] | np.ndarray, rows: np.ndarray) -> LogitsMetrics:
    """Rows of the engine against other rows of it, float32[n, V] both."""
    comparison = LogitsComparison(None)
    for index, (expected, found) in enumerate(zip(reference, rows, strict=True)):
        block = FullRows(np.array([index], np.int64), np.asarray(expected, np.float32)[None])
        comparison.add(block, np.asarray(found)[None])
    return comparison.result()
