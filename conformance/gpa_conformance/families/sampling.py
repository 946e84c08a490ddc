"""Family "sampling": draws follow the one sampling rule (`gpa_engines.sampling`).

Every answer is replayed by the shared sampler over the engine's own prefill logits of prompt and answer: at each step
that gives the distribution p from which the next id should have come. With U uniform, F(id before) + U p(id) is then
uniform on [0, 1] and independent from step to step (Rosenblatt 1952, randomised for discrete draws), so that all draws
of all steps can be tested together although no two come from the same distribution. Ids are ranked by falling
probability, so that a wrong temperature or a missing filter tilts the bins; and a second time with the ids that the
answer holds already before all others, so that a generator that starts anew at every step shows. Using the engine's own
logits, not the baseline's, keeps the rounding of a small dtype, which the family "logits" judges, out of this test.
Where the engine gives no logits, first tokens are tested against the baseline's.

Per case: a chi-square test of either value, tests of the mean log-probability and of how often ids of the prompt and of
the answer come again, and a chi-square test of the first tokens of many seeds where the case asks for it. Each case may
use its share of the declared significance (Bonferroni), and within a case Holm's correction is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpa_conformance.cases import Case
from gpa_conformance.context import Context, Skip
from gpa_conformance.families.answers import answers, faults, fitting
from gpa_conformance.families.findings import Findings
from gpa_conformance.prompts import Prompt, spread_ids
from gpa_conformance.reference_rows import FullRows
from gpa_conformance.results import CaseResult
from gpa_conformance.statistics import chi_square, holm
from gpa_engines.engine import GenerationRequest, SamplingParams
from gpa_engines.sampling import Sampler

STEPS = 64
"""Tokens of an answer: few prefills for many draws."""

BINS = 20

ENOUGH = 25.0
"""Variance of a count from which the normal distribution describes it well."""

Term = tuple[float, float]
"""A value less its expectation, and its variance."""


@dataclass(frozen=True, slots=True)
class _Draw:
    """One id against the distribution that it should have come from.

    rank, use: uniform in [0, 1] under the rule, with ids in the order of falling probability, or with those that the
    answer holds already first. surprise: of its log-probability. of_prompt, of_answer: of whether it is one of theirs;
    an id of both counts for the prompt.
    """

    rank: float
    use: float
    surprise: Term
    of_prompt: Term
    of_answer: Term


async def run(context: Context, case: Case) -> CaseResult:
    """Kinds: "draws" (answers of `STEPS` tokens), "draws-after" (pairs: the first two tokens of many seeds)."""
    if case.kind not in ("draws", "draws-after"):
        raise ValueError(f"case {case.id} has the kind {case.kind!r}")
    found = Findings(case)
    tests: dict[str, float] = {}
    for name, prompt in context.prompts(case).items():
        if "among" in case.spec:
            context.need("allowed")
            prompt = _among(prompt, case.spec["among"], context.engine.info.vocab_size)
        if "logits" in context.engine.info.capabilities:
            steps = STEPS if case.kind == "draws" else 2
            await _test_answers(context, case, found, prompt, name, steps, tests)
        if firsts := int(case.spec.get("first_tokens", 0)) or (
            "logits" not in context.engine.info.capabilities and 256
        ):
            await _test_firsts(context, case, found, prompt, name, firsts, tests)
    if not tests:
        raise Skip("no logits, and the baseline has none for this prompt")
    adjusted = dict(zip(tests, holm(list(tests.values())), strict=True))
    share = sum(each.family == "sampling" for each in context.cases.values())
    found.metrics.update({f"p_{name}": value for name, value in tests.items()})
    worst = min(adjusted, key=adjusted.__getitem__)
    limit = context.all_limits.sampling.check("significance", min(1.0, adjusted[worst] * share))
    found.add([limit])
    if not limit.passed:
        found.complain(
            f"the draws do not follow the sampling rule: {worst} has p = {tests[worst]:.2g} "
            f"({adjusted[worst] * share:.2g} for all sampling tests together)"
        )
    return found.result()


async def _test_answers(
    context: Context,
    case: Case,
    found: Findings,
    prompt: Prompt,
    name: str,
    steps: int,
    tests: dict[str, float],
) -> None:
    """Replay whole answers."""
    requests = _requests(context, case, prompt, math.ceil(case.spec["draws"] / steps), steps)
    given = await answers(context.engine, requests)
    found.count(f"stream_faults of {name}", faults(given))
    random = np.random.default_rng(case.spec["seed"] + context.seed)
    draws: list[_Draw] = []
    impossible: list[str] = []
    prefixes: dict[tuple[int, ...], NDArray[np.float32]] = {}
    for wanted, each in zip(requests, given, strict=True):
        rows = await _rows(context, wanted, each.ids, prefixes if steps == 2 else None)
        if not np.isfinite(context.cut(rows)).all():
            impossible.append(f"{name}: NaN or infinite logits after an answer's start")
            continue
        replay = _Replay(wanted, context.limits["delta_logp_max"].value)
        for row, token in zip(rows, each.ids, strict=True):
            draw = replay.step(row, token, random)
            if draw is None:
                impossible.append(f"{name}: id {token} was drawn at step {replay.done - 1}, which the rule excludes")
            else:
                draws.append(draw)
    found.metrics.update({f"draws of {name}": float(len(draws))})
    found.count(f"impossible_draws of {name}", impossible, "the one sampling rule")
    if draws:
        for what, values in (("rank", [draw.rank for draw in draws]), ("use", [draw.use for draw in draws])):
            counts = np.histogram(values, BINS, (0, 1))[0]
            found.plot({f"draws_by_{what}": counts.astype(float).tolist()})
            tests[f"{what} of {name}"] = chi_square(counts, np.full(BINS, 1 / BINS)).p_value
        tests[f"log-probability of {name}"] = _mean_test([draw.surprise for draw in draws])
        tests[f"repeats of the prompt of {name}"] = _mean_test([draw.of_prompt for draw in draws], ENOUGH)
        tests[f"repeats of the answer of {name}"] = _mean_test([draw.of_answer for draw in draws], ENOUGH)


async def _test_firsts(
    context: Context, case: Case, found: Findings, prompt: Prompt, name: str, count: int, tests: dict[str, float]
) -> None:
    """First tokens of many seeds, all from one distribution: seeds must be independent of each other."""
    requests = _requests(context, case, prompt, count, 1)
    if "logits" in context.engine.info.capabilities:
        row = await context.last_row(prompt.ids)
    else:
        row = _baseline_row(context, case, name)
    given = await answers(context.engine, requests)
    found.count(f"stream_faults of first tokens of {name}", faults(given))
    ids, probabilities = _sampler(requests[0]).distribution(row)
    counts = np.zeros(len(ids))
    outside = 0
    for each in given:
        at = np.searchsorted(ids, each.ids[0]) if each.ids else len(ids)
        if at < len(ids) and ids[at] == each.ids[0]:
            counts[at] += 1
        else:
            outside += 1
    # An id at the edge of a filter may fall on its other side by rounding.
    found.check(f"first tokens outside of {name}", outside, "<=", 0.02 * count, "ids at the edge of top-k or top-p")
    if counts.sum():
        tests[f"first tokens of {name}"] = chi_square(counts.astype(int), probabilities).p_value


def _requests(context: Context, case: Case, prompt: Prompt, count: int, steps: int) -> list[GenerationRequest]:
    first = case.spec["seed"] + context.seed
    return [
        fitting(
            context,
            GenerationRequest(
                prompt.ids,
                SamplingParams(max_new_tokens=steps, seed=first + index, **case.spec["sampling"]),
                (),
                prompt.allowed,
            ),
        )
        for index in range(count)
    ]


async def _rows(
    context: Context,
    wanted: GenerationRequest,
    ids: Sequence[int],
    known: dict[tuple[int, ...], NDArray[np.float32]] | None,
) -> NDArray[np.float32]:
    """float32[len(ids), V]: what each id of an answer was drawn from. known: rows of short answers, kept for others."""
    prompt = wanted.prompt_ids
    if known is None:
        return await context.rows((*prompt, *ids[:-1]), range(len(prompt) - 1, len(prompt) - 1 + len(ids)))
    for length in range(len(ids)):
        start = tuple(ids[:length])
        if start not in known:
            known[start] = np.array(await context.last_row((*prompt, *start)))
    return np.stack([known[tuple(ids[:length])] for length in range(len(ids))])


class _Replay:
    """The shared sampler along one answer, told what was drawn. slack: nats by which a row's log-probabilities may
    differ from the reference's; two rows of an engine, of its decoding and its prefill, may lie twice that apart."""

    def __init__(self, wanted: GenerationRequest, slack: float) -> None:
        self.done = 0
        self._wanted = wanted
        self._slack = slack
        self._drawn: list[int] = []

    def step(self, row: NDArray[np.float32], token: int, random: np.random.Generator) -> _Draw | None:
        """Judge the next id; None for one that the rule excludes."""
        sampler = _sampler(self._wanted, self._drawn)
        used = self._drawn[:]
        self.done += 1
        self._drawn.append(token)
        ids, probabilities = sampler.distribution(_of(row, sampler))
        logs = np.log(probabilities)
        entropy = -float((probabilities * logs).sum())
        by_rank = np.lexsort((ids, -probabilities))
        by_use = np.lexsort((ids, ~np.isin(ids, used)))
        if not (ids == token).any():
            if not self._at_the_edge(row, token, ids):
                return None
            token = int(ids[by_rank[-1]])
        share = random.random()
        rank, use = (_value(ids[order], probabilities[order], token, share) for order in (by_rank, by_use))
        in_prompt = np.isin(ids, self._wanted.prompt_ids)
        return _Draw(
            rank,
            use,
            (float(logs[ids == token][0]) + entropy, float((probabilities * np.square(logs + entropy)).sum())),
            _hit(probabilities, in_prompt, ids == token),
            _hit(probabilities, np.isin(ids, used) & ~in_prompt, ids == token),
        )

    def _at_the_edge(self, row: NDArray[np.float32], token: int, kept: NDArray[np.int64]) -> bool:
        """Whether rounding may have put a token on the other side of a filter."""
        allowed = self._wanted.allowed
        if allowed is not None and not any(token in ids for ids in allowed):
            return False
        penalty = self._wanted.sampling.repetition_penalty
        return float(row[kept].min() - row[token]) <= 2 * self._slack * max(1.0, penalty)


def _value(ids: NDArray[np.int64], probabilities: NDArray[np.float64], token: int, share: float) -> float:
    """The sum of what stands before a token and of a share of its own probability."""
    at = int(np.flatnonzero(ids == token)[0])
    return min(float(probabilities[:at].sum() + share * probabilities[at]), 1.0)


def _hit(probabilities: NDArray[np.float64], among: NDArray[np.bool_], drawn: NDArray[np.bool_]) -> Term:
    mass = float(probabilities[among].sum())
    return float((among & drawn).any()) - mass, max(0.0, mass * (1 - mass))


def _among(prompt: Prompt, others: int, vocab_size: int) -> Prompt:
    """The same prompt twice over, continued by its own ids and some others only."""
    ids = sorted({*prompt.ids, *spread_ids(others, 1, vocab_size)})
    return replace(prompt, ids=prompt.ids * 2, allowed=tuple(range(token, token + 1) for token in ids))


def _sampler(wanted: GenerationRequest, drawn: Sequence[int] = ()) -> Sampler:
    """The shared sampler after these tokens: a penalty counts each id of prompt and answer once."""
    return Sampler(wanted.sampling, (*wanted.prompt_ids, *drawn), wanted.stop_ids, wanted.allowed)


def _of(row: NDArray[np.float32], sampler: Sampler) -> NDArray[np.float32]:
    return row if sampler.candidate_ids is None else row[sampler.candidate_ids]


def _mean_test(terms: Sequence[Term], enough: float = 0.0) -> float:
    """Two-sided p-value of the sum being 0: normal, as the terms are many; 1 for a variance up to `enough`."""
    total, variance = (float(sum(values)) for values in zip(*terms, strict=True))
    return math.erfc(abs(total) / math.sqrt(2 * variance)) if variance > enough else 1.0


def _baseline_row(context: Context, case: Case, name: str) -> NDArray[np.float32]:
    """The reference's last row; what it does not hold cannot be drawn."""
    *_, last = context.baseline.logits(name).blocks()
    if isinstance(last, FullRows):
        return last.logits[-1]
    if not 0 < case.spec["sampling"].get("top_k", 0) < last.top.ids.shape[1]:
        raise Skip(f"the baseline holds only the top of the rows of {name}, and the case has no top_k below that")
    row = np.full(context.engine.info.vocab_size, -np.inf, np.float32)
    for top in filter(None, (last.top, last.allowed)):
        row[top.ids[-1]] = top.logits[-1]
    return row
