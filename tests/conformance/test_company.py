"""Whether rounding explains that an answer in company is another one: judged by the engine's own logits."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from gpa_conformance.cases import load_cases
from gpa_conformance.context import Context
from gpa_conformance.families.answers import Answer
from gpa_conformance.families.company import Pair, compare
from gpa_conformance.families.findings import Findings
from gpa_conformance.limits import load_limits
from gpa_conformance.results import CaseResult
from gpa_engines.engine import GenerationRequest, SamplingParams

LOGITS = np.array([2.0, 1.9, 0.0, -30.0], np.float32)
"""What follows every prompt: ids 0 and 1 are a near tie in bfloat16 (0.2 nats), id 2 is not, id 3 is never drawn."""

BATCHED = frozenset(("logits", "batch"))


def seed_of(low: float, high: float) -> int:
    """A seed whose first number lies between the two."""
    return next(seed for seed in range(10_000) if low < np.random.default_rng(seed).random() < high)


def judge(
    alone: tuple[int, ...],
    together: tuple[int, ...],
    capabilities: frozenset[str] = BATCHED,
    *,
    stopped: bool = False,
    **sampling: Any,
) -> CaseResult:
    """The comparison of two answers; with `stopped` the one in company ended at a stop id, which is 1."""

    async def last_row(ids: tuple[int, ...]) -> np.ndarray:
        return LOGITS

    context = SimpleNamespace(
        engine=SimpleNamespace(info=SimpleNamespace(capabilities=capabilities)),
        limits=load_limits().for_dtype("bfloat16"),
        last_row=last_row,
    )
    found = Findings(load_cases()[0])
    wanted = GenerationRequest((0,), SamplingParams(max_new_tokens=4, **sampling), stop_ids=(1,) if stopped else ())
    pair = Pair(wanted, Answer(alone, "length", None, ()), Answer(together, "stop" if stopped else "length", None, ()))
    asyncio.run(compare(cast(Context, context), found, "differing", {"one": pair}))
    return found.result()


def test_equal_answers_are_right_and_a_promise_is_kept_to_the_letter() -> None:
    assert judge((0, 2), (0, 2)).status == "passed"
    near = judge((0,), (1,), BATCHED | {"batch_invariant"})
    assert near.status == "failed"
    assert "rounding that depends on the batch" in near.reason
    assert judge((0,), (1,), frozenset(("logits",))).status == "failed", "one after the other, nothing can depend on it"


@pytest.mark.parametrize(
    ("alone", "together", "stopped", "passes"),
    [((0,), (1,), False, True), ((0,), (2,), False, False), ((0,), (), True, True), ((0, 0), (0,), False, False)],
    ids=["near tie", "far", "stopped at a near tie", "cut short"],
)
def test_greedy(alone: tuple[int, ...], together: tuple[int, ...], stopped: bool, passes: bool) -> None:
    result = judge(alone, together, stopped=stopped)
    assert (result.status == "passed") is passes
    assert ("1 of 1 answers part by rounding" in result.reason) is passes


def test_drawn_answers_part_only_at_a_border() -> None:
    border = float(np.exp(2.0) / np.exp(LOGITS).sum())  # between ids 0 and 1
    sampling = {"temperature": 1.0, "seed": seed_of(border - 0.04, border)}
    assert judge((0,), (1,), **sampling).status == "passed"
    assert "a leak" in judge((0,), (2,), **sampling).reason
    inside = judge((0,), (1,), temperature=1.0, seed=seed_of(0, border - 0.1))
    assert "of the probability away: more than rounding: a leak" in inside.reason


def test_of_an_engine_with_random_numbers_of_its_own_only_the_possible_can_be_told() -> None:
    foreign = {"temperature": 1.0, "seed": seed_of(0.0, 0.2), "top_k": 3}
    assert judge((2,), (1,), **foreign).status == "passed"
    assert "it could not be drawn: more than rounding" in judge((2,), (3,), **foreign).reason


def test_without_logits_nothing_is_excused() -> None:
    assert judge((0,), (1,), frozenset(("batch",))).status == "failed"
