"""A known mistake that rounding hides, found by its direction.

In bfloat16 an engine that uses an RMSNorm eps of 1e-5 instead of 1e-6 is no further from the float32 baseline than one
that does not: rounding moves the logits ten times as much. But rounding moves them in all directions and the mistake in
one, the same at every run: d = logits of the reference with the mistake, less those without. The baseline holds d for
some thousand positions, and the coefficient

    c = sum <x - ref, d> / sum <d, d>

is 0 for an engine without the mistake and 1 for one with it, whatever else is random (a matched filter: Turin 1960).
Its standard error comes from leaving out one prompt after the other (the jackknife: Tukey 1958). Where the error is too
large to tell 0 from 1, the case is skipped and says so.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gpa_conformance.baseline import SuspectReference
from gpa_conformance.cases import Case
from gpa_conformance.context import Context, Skip
from gpa_conformance.families.findings import CONTRACT, Findings
from gpa_conformance.results import CaseResult
from gpa_conformance.wire import WrongShape

HALF = 0.5
"""Between 0 and 1: the coefficient from which a mistake is more likely than none."""

SURE = 3.0
"""Standard errors that must lie between 0 and `HALF`."""

ROUNDED_AT_RANDOM = ("float32", "float16", "bfloat16")
"""Quantised weights move the logits always in the same direction, which may happen to be that of the mistake."""


async def run(context: Context, case: Case) -> CaseResult:
    """Measure the coefficient of one mistake."""
    if context.limits.name not in ROUNDED_AT_RANDOM:
        raise Skip(f"{context.limits.name}: the rounding of quantised weights is not random")
    if reason := context.baseline.missing(case):
        raise Skip(reason)
    found = Findings(case)
    reference = context.baseline.suspect(case.id)
    along, size, non_finite = [], [], 0
    known = np.ones(len(reference.columns), bool)
    if context.covered is not None:
        known = np.isin(reference.columns, context.covered)
        if not known.any():
            raise Skip("the engine has no logits of the ids that the baseline keeps")
    for number, ids in enumerate(reference.prompts):
        try:
            rows = await context.rows(ids, range(len(ids)))
        except WrongShape as error:
            found.count("wrong_shape", [str(error)], CONTRACT)
            return found.result()
        given = rows[:, reference.columns[known]].astype(np.float64)
        non_finite += int((~np.isfinite(given)).sum())
        direction = reference.direction[number][:, known].astype(np.float64)
        along.append(float(((given - reference.logits[number][:, known]) * direction).sum()))
        size.append(float((direction * direction).sum()))
    found.check("non_finite", non_finite, "==", 0, "a NaN is never right")
    if not found.failed:
        _judge(found, reference, np.asarray(along), np.asarray(size))
    return found.result()


def _judge(found: Findings, reference: SuspectReference, along: NDArray, size: NDArray) -> None:
    coefficient, error = coefficient_of(along, size)
    found.metrics.update({"coefficient": coefficient, "standard_error": error, "positions": float(reference.positions)})
    found.plot({"coefficient_by_prompt": (along / size).tolist()})
    shown = f"{coefficient:.2f} ± {error:.2f}"
    if SURE * error > HALF:
        raise Skip(f"rounding hides it: the coefficient is {shown}, 0 without the mistake and 1 with it")
    found.check("mistake", abs(coefficient), "<=", HALF, f"0 without {reference.mistake}, 1 with it")
    if not found.failed:
        return
    if abs(coefficient - 1) <= HALF:
        found.complain(
            f"the logits are moved in the direction of {reference.mistake} (coefficient {shown}; 1 is fully)"
        )
    else:
        found.complain(f"another difference is larger than {reference.mistake} would be (coefficient {shown})")


def coefficient_of(along: NDArray[np.float64], size: NDArray[np.float64]) -> tuple[float, float]:
    """(coefficient, standard error) from the two sums of every prompt."""
    count = len(along)
    without = (along.sum() - along) / (size.sum() - size)
    error = math.sqrt((count - 1) / count * float(np.square(without - without.mean()).sum()))
    return float(along.sum() / size.sum()), error
