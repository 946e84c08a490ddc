"""Answers given in company, beside what the same requests got alone: they must be the same.

An engine that lacks the capability "batch_invariant" sums in an order that depends on what runs beside a request. Its
answers may part where rounding decides, and nowhere else. Whether rounding decided is seen in the logits that the
engine itself gives of what both answers begin with:

- Of greedy answers the other token is at most `regret_max` nats below.
- A drawn token is where a point falls on the candidates' probabilities, laid one after the other. Logits that move
  against each other by at most d nats move the borders between them by at most d / 4 at temperature 1. Both tokens lie
  within that of the point for d = `regret_max`, and both could be drawn at all. Of an engine whose seeds give other
  points than ours only the latter can be told.

So a leak that moves logits less than rounding may is not seen in such an engine, unless it is run in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from gpa_codecs.errors import RequestError
from gpa_conformance.context import Context
from gpa_conformance.families.answers import Answer, describe_difference, first_difference
from gpa_conformance.families.findings import Findings
from gpa_engines.engine import GenerationRequest
from gpa_engines.sampling import Sampler

ROUNDING = "rounding that depends on the batch"
LEAK = "more than rounding: a leak between requests"


@dataclass(frozen=True, slots=True)
class Pair:
    """What a request got alone and in company."""

    wanted: GenerationRequest
    alone: Answer
    together: Answer


async def compare(context: Context, found: Findings, metric: str, pairs: Mapping[str, Pair]) -> None:
    """Check as `metric` that no answer differs, but by rounding where the engine does not promise the last bit.

    pairs: by how a complaint begins, "tts-english beside 7 others".
    """
    capabilities = context.engine.info.capabilities
    promised = "batch_invariant" in capabilities or "batch" not in capabilities
    complaints, rounded = [], 0
    for name, pair in pairs.items():
        if pair.alone.ids == pair.together.ids:
            continue
        excused, why = await _explain(context, pair)
        if excused and not promised:
            rounded += 1
        else:
            difference = describe_difference(pair.together.ids, pair.alone.ids)
            complaints.append(f"{name}: {difference}, as alone{why and f' ({why})'}")
    found.count(metric, complaints)
    if not promised:
        found.metrics[f"{metric} by rounding"] = rounded
    if rounded:
        found.note(f"{rounded} of {len(pairs)} answers part by {ROUNDING}; the engine does not promise the last bit")


async def _explain(context: Context, pair: Pair) -> tuple[bool, str]:
    """(whether rounding explains the difference, the reason in words, or "" where nothing can be told)."""
    index = first_difference(pair.alone.ids, pair.together.ids)
    assert index is not None
    if "logits" not in context.engine.info.capabilities:
        return False, ""
    common = pair.alone.ids[:index]
    row = await context.last_row((*pair.wanted.prompt_ids, *common))
    try:
        sampler, plain = _replayed(pair.wanted, common), _replayed(_unfiltered(pair.wanted), common)
        if sampler.candidate_ids is not None:
            row = row[sampler.candidate_ids]
        ids, probabilities = sampler.distribution(row)
        free, chances = plain.distribution(row)
    except RequestError:  # an id that may not be generated, a NaN: other checks name them
        return False, ""
    nats = dict(zip(free.tolist(), np.log(np.maximum(chances, 1e-300)).tolist(), strict=True))
    first, second = (_token(each, index, pair.wanted, nats) for each in (pair.alone, pair.together))
    if first is None or second is None or not nats.keys() >= {first, second}:
        return False, ""
    limit = context.limits["regret_max"].value
    if pair.wanted.sampling.temperature == 0:
        gap = nats[first] - nats[second]
        return abs(gap) <= limit, f"it is {gap:.3g} nats below in the prefill: {_kind(abs(gap) <= limit)}"
    least = min(nats[token] for token in ids.tolist()) - limit
    possible = min(nats[first], nats[second]) >= least
    point, reach = _point(pair.wanted, index), limit / 4 / pair.wanted.sampling.temperature
    if _distance(ids, probabilities, first, point) > reach:
        return possible, f"{'it could be drawn, too' if possible else 'it could not be drawn'}: {_kind(possible)}"
    far = _distance(ids, probabilities, second, point)
    near = possible and far <= reach
    return near, f"drawn {far:.2g} of the probability away: {_kind(near)}"


def _kind(rounding: bool) -> str:
    return ROUNDING if rounding else LEAK


def _replayed(wanted: GenerationRequest, common: tuple[int, ...]) -> Sampler:
    sampler = Sampler(wanted.sampling, wanted.prompt_ids, wanted.stop_ids, wanted.allowed)
    sampler.replay(common)
    return sampler


def _unfiltered(wanted: GenerationRequest) -> GenerationRequest:
    """The same at temperature 1 and without the filters: log-probabilities of its candidates differ as logits do."""
    return replace(wanted, sampling=replace(wanted.sampling, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0))


def _token(answer: Answer, index: int, wanted: GenerationRequest, nats: Mapping[int, float]) -> int | None:
    """What the answer has at `index`; of one that was stopped there, the likeliest stop id."""
    if index < len(answer.ids):
        return answer.ids[index]
    if answer.finish_reason != "stop":
        return None
    return max(wanted.stop_ids, key=lambda token: nats.get(token, -np.inf), default=None)


def _point(wanted: GenerationRequest, index: int) -> float:
    """The random number that the sampling rule takes for the answer's token `index`."""
    return float(np.random.default_rng(wanted.sampling.seed).random(index + 1)[-1])


def _distance(ids: np.ndarray, probabilities: np.ndarray, token: int, point: float) -> float:
    """How far `point` is from the part of the line that is the token's; of one that is not kept, from its place."""
    borders = np.concatenate([[0.0], np.cumsum(probabilities)]) / probabilities.sum()
    at = int(np.searchsorted(ids, token))
    end = borders[at + 1] if at < len(ids) and ids[at] == token else borders[at]
    return max(0.0, float(borders[at] - point), float(point - end))
