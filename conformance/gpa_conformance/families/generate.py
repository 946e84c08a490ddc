"""Family "generate": greedy ids against the baseline's.

Two engines that agree may still choose differently where the best two ids are nearly equal. The first difference is
accepted if neither side prefers its own by more than the dtype's regret limit and each side's id is among the other's
best five (unless the dtype is so coarse that its limits leave this out); what follows a difference is not compared, as
the prompts are then different ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpa_conformance.baseline import GreedyReference
from gpa_conformance.cases import Case
from gpa_conformance.context import Context, Skip
from gpa_conformance.families.answers import Answer, answer, first_difference, fitting
from gpa_conformance.families.findings import Findings
from gpa_conformance.results import CaseResult
from gpa_engines.engine import GenerationRequest, SamplingParams
from gpa_engines.sampling import candidate_ids

STOP = -1
"""Stands for the stop id that ended an answer: which one of several it was is not part of an answer."""


@dataclass(frozen=True, slots=True)
class _Parting:
    """The first difference. expected, chosen: the baseline's and the engine's id, or STOP."""

    step: int
    expected: int
    chosen: int


async def run(context: Context, case: Case) -> CaseResult:
    """Kind: "greedy"."""
    if case.kind != "greedy":
        raise ValueError(f"case {case.id} has the kind {case.kind!r}")
    return await run_greedy(context, case)


async def run_greedy(context: Context, case: Case) -> CaseResult:
    """One greedy request against the baseline's answer."""
    found = Findings(case)
    if reason := context.baseline.missing(case):
        raise Skip(reason)
    reference = context.baseline.greedy(case.id)
    sampling = SamplingParams(max_new_tokens=case.spec["new_tokens"], **case.spec["sampling"])
    prompt = reference.prompt
    if prompt.allowed is not None:
        context.need("allowed")
    if prompt.allowed is None and context.covered is not None:
        raise Skip("the baseline's answer is over the whole vocabulary, and the engine has a part of it")
    wanted = fitting(context, GenerationRequest(prompt.ids, sampling, prompt.stop_ids, prompt.allowed))
    given = await answer(context.engine, wanted)
    found.count("stream_faults", given.faults)
    parting = _find_parting(reference, given)
    found.metrics.update(
        {
            "tokens": float(len(given.ids)),
            "tokens_expected": float(len(reference.ids)),
            "tokens_agreed": float(len(reference.ids) if parting is None else parting.step),
        }
    )
    found.plot({"margin": reference.margins.tolist()})
    if parting is None:
        found.check("differing_tokens", 0, "==", 0, "the baseline's greedy answer")
    else:
        await _judge(context, found, reference, wanted, parting)
    return found.result()


def _find_parting(reference: GreedyReference, given: Answer) -> _Parting | None:
    step = first_difference(reference.ids.tolist(), given.ids)
    if step is None:
        same = reference.finish_reason == given.finish_reason
        return None if same else _Parting(len(given.ids), STOP, STOP)
    expected = int(reference.ids[step]) if step < len(reference.ids) else STOP
    return _Parting(step, expected, given.ids[step] if step < len(given.ids) else STOP)


async def _judge(
    context: Context, found: Findings, reference: GreedyReference, wanted: GenerationRequest, parting: _Parting
) -> None:
    """Whether the first difference is one that rounding explains."""
    step, limit = parting.step, context.limits["regret_max"]
    allowance = limit.value * max(1.0, wanted.sampling.repetition_penalty)
    source = f"{context.limits.name}: {limit.source}"
    within = step < len(reference.margins)
    margin = float(reference.margins[step]) if within else np.inf
    best = reference.top5[step].tolist() if within else []
    found.check("parting_margin", margin, "<=", allowance, source)
    ranks = "parting_in_top5" in context.limits
    if ranks:
        chosen = _among(parting.chosen, best, wanted)
        found.check("chosen_in_baseline_top5", chosen, "==", 1, context.limits["parting_in_top5"].source)
    told = [
        f"differs at token {step}: {_name(parting.chosen)} instead of {_name(parting.expected)}, "
        f"which the baseline prefers to its second best by {margin:.3g} nats"
    ]
    if "logits" in context.engine.info.capabilities:
        scores = await _scores(context, wanted, reference.ids[:step].tolist())
        order = np.lexsort((scores[0], -scores[1]))[:5]
        top = scores[0][order].tolist()
        if ranks:
            expected = _among(parting.expected, top, wanted)
            found.check("expected_in_engine_top5", expected, "==", 1, context.limits["parting_in_top5"].source)
        preference = _score(parting.chosen, scores, wanted) - _score(parting.expected, scores, wanted)
        found.check("parting_preference", abs(preference), "<=", 2 * allowance, source)
        told.append(f"the engine's own prefill prefers its token by {preference:.3g} nats")
        if preference < -allowance:
            told.append("its decoding contradicts its prefill")
    if found.failed:
        found.complain(", ".join(told))
    else:
        found.note(", ".join(told) + ": rounding, accepted")


async def _scores(
    context: Context, wanted: GenerationRequest, answer_ids: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(ids, penalised logits) of what may follow, by the engine's own prefill."""
    seen = (*wanted.prompt_ids, *answer_ids)
    row = np.array(await context.last_row(seen), np.float32)
    penalty = np.float32(wanted.sampling.repetition_penalty)
    distinct = np.unique(np.asarray(seen))
    row[distinct] = np.where(row[distinct] < 0, row[distinct] * penalty, row[distinct] / penalty)
    ids = candidate_ids(wanted.allowed, wanted.stop_ids)
    ids = np.arange(len(row)) if ids is None else ids
    return ids, row[ids].astype(np.float64)


def _score(token: int, scores: tuple[NDArray[np.int64], NDArray[np.float64]], wanted: GenerationRequest) -> float:
    ids = wanted.stop_ids if token == STOP else (token,)
    return float(scores[1][np.isin(scores[0], ids)].max(initial=-np.inf))


def _among(token: int, best: list[int], wanted: GenerationRequest) -> bool:
    ids = wanted.stop_ids if token == STOP else (token,)
    return not set(ids).isdisjoint(best)


def _name(token: int) -> str:
    return "the stop id" if token == STOP else f"id {token}"
