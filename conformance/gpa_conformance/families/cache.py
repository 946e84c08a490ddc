"""Family "cache": what is decoded token by token, and in chunks, is what the prefill says, without a look inside.

The public protocol shows logits of prefills only, so the cache is judged by the tokens that are decoded through it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpa_conformance.cases import Case
from gpa_conformance.context import Context, Skip
from gpa_conformance.families.answers import answer, faults, fitting, request
from gpa_conformance.families.findings import Findings
from gpa_conformance.families.logits import compare_rows
from gpa_conformance.prompts import Prompt, spread_ids
from gpa_conformance.results import CaseResult
from gpa_engines.engine import GenerationRequest, SamplingParams

ROWS = 4
"""Rows at the end of every prefix that are compared with the whole's."""


async def run(context: Context, case: Case) -> CaseResult:
    """Kinds: "prefixes", "decode-matches-prefill", "forced-path"."""
    context.need("logits")
    match case.kind:
        case "prefixes":
            return await _run_prefixes(context, case)
        case "decode-matches-prefill":
            return await _run_decode(context, case)
        case "forced-path":
            context.need("allowed")
            return await _run_forced(context, case)
        case kind:
            raise ValueError(f"case {case.id} has the kind {kind!r}")


async def _run_prefixes(context: Context, case: Case) -> CaseResult:
    """The last rows of every prefix against the same rows of the whole prompt."""
    found = Findings(case)
    ids = context.prompt(case.id).ids
    lengths = [length for length in case.spec["lengths"] if length <= len(ids)]
    ends = {length: list(range(max(0, length - ROWS), length)) for length in lengths}
    wanted = sorted(set().union(*ends.values()))
    whole = dict(zip(wanted, context.cut(await context.rows(ids, wanted)), strict=True))
    expected, rows, worst = [], [], {}
    for length in lengths:
        part = context.cut(await context.rows(ids[:length], ends[length]))
        reference = [whole[position] for position in ends[length]]
        worst[length] = compare_rows(reference, part).summary()["rel_l2_max"]
        expected.extend(reference)
        rows.extend(part)
    summary = compare_rows(expected, np.asarray(rows)).summary()
    found.metrics.update(summary)
    found.add(context.limits.checks(summary))
    found.plot({"prefix": [float(length) for length in lengths], "prefix_rel_l2": list(worst.values())})
    if found.failed:
        length = max(worst, key=lambda each: np.nan_to_num(worst[each], nan=np.inf))
        found.complain(f"the prefix of {length} ids differs most from the whole: rel-L2 {worst[length]:.2g}")
    return found.result()


async def _run_decode(context: Context, case: Case) -> CaseResult:
    """Greedy tokens against the prefill of prompt and answer: the regret of each under its row."""
    found = Findings(case)
    regrets: list[float] = []
    for name, prompt in context.prompts(case).items():
        wanted = fitting(context, request(prompt, case.spec["new_tokens"]))
        given = await answer(context.engine, wanted)
        found.count(f"stream_faults of {name}", [f"{name}: {fault}" for fault in given.faults])
        if not given.ids:
            continue
        at = list(range(len(prompt.ids) - 1, len(prompt.ids) - 1 + len(given.ids)))
        rows = await context.rows((*prompt.ids, *given.ids[:-1]), at)
        regrets.extend(_regret(row, token, wanted) for row, token in zip(rows, given.ids, strict=True))
        bad = [step for step, row in enumerate(context.cut(rows)) if not np.isfinite(row).all()]
        found.count(f"non_finite rows of {name}", [f"{name}: NaN or infinite logits at step {step}" for step in bad])
    worst = float(np.max(regrets)) if regrets else np.nan
    found.metrics.update({"tokens": float(len(regrets)), "regret_mean": float(np.mean(regrets)) if regrets else np.nan})
    found.add([context.limits.check("regret_max", worst)])
    found.plot({"decode_regret": regrets})
    if found.failed and worst > 0:
        wrong = sum(each > context.limits["regret_max"].value for each in regrets)
        found.complain(
            f"{wrong} of {len(regrets)} decoded tokens are not what the prefill of the same ids prefers "
            f"(up to {worst:.3g} nats): the cache, its positions, or a step that repeats or drops a token"
        )
    return found.result()


def _regret(row: NDArray[np.float32], token: int, wanted: GenerationRequest) -> float:
    """Nats by which a token is worse than the best allowed one; NaN for a row that holds one, inf for a foreign id."""
    possible = row
    if wanted.allowed is not None:
        possible = np.concatenate([row[ids.start : ids.stop] for ids in wanted.allowed])
    return float(possible.max()) - float(row[token])


async def _run_forced(context: Context, case: Case) -> CaseResult:
    """Force a path by allowing one id, then let it compete with another: the prefill's logits decide who must win.

    The rival is possible only after min_new_tokens, as a stop id; it ends the answer if it wins. The rivals are the ids
    next above and next below the forced one by more than the dtype's regret limit, so a shift of that size shows.
    """
    found = Findings(case)
    margin = context.limits["regret_max"].value
    path = _path(context, case)
    complaints: list[str] = []
    checked = 0
    for name, prompt in context.prompts(case).items():
        for index, forced in enumerate(path):
            length = case.spec["lengths"][index % len(case.spec["lengths"])]
            row = await context.last_row((*prompt.ids, *(forced,) * length))
            if not np.isfinite(context.cut(row)).all():
                complaints.append(f"{name}: NaN or infinite logits after {length} times id {forced}")
                continue
            for rival, must_win in _rivals(row, forced, margin):
                checked += 1
                complaint = await _compete(context, prompt, forced, length, rival, must_win)
                if complaint:
                    complaints.append(f"{name}: {complaint}; the prefill says otherwise by over {margin:.2g} nats")
    if not checked and not complaints and "parting_in_top5" not in context.limits:
        # Only of the coarsest dtypes: elsewhere rows without two distinct ids are a fault.
        raise Skip(f"no two ids are further apart than the dtype's regret limit allows ({margin:g} nats)")
    found.metrics["competitions"] = checked
    found.check("competitions", checked, ">=", 1, "a case that compared nothing proves nothing")
    found.count("lost_competitions", complaints)
    return found.result()


def _path(context: Context, case: Case) -> tuple[int, ...]:
    """Ids to be forced, of those that the engine has."""
    length, seed, covered = case.spec["path"]["length"], case.spec["path"]["seed"], context.covered
    if covered is None:
        return tuple(spread_ids(length, seed, context.engine.info.vocab_size))
    return tuple(covered[list(spread_ids(length, seed, len(covered)))].tolist())


def _rivals(row: NDArray[np.float32], forced: int, margin: float) -> list[tuple[int, bool]]:
    """(id, whether it must win) for the ids nearest to the forced one that differ by more than `margin`."""
    gap = row.astype(np.float64) - float(row[forced])
    rivals = []
    above, below = np.flatnonzero(gap > 2 * margin), np.flatnonzero(gap < -2 * margin)
    if len(above):
        rivals.append((int(above[np.argmin(gap[above])]), True))
    if len(below):
        rivals.append((int(below[np.argmax(gap[below])]), False))
    return rivals


async def _compete(
    context: Context, prompt: Prompt, forced: int, length: int, rival: int, must_win: bool
) -> str | None:
    """What went wrong, if anything did."""
    wanted = GenerationRequest(
        prompt.ids,
        SamplingParams(max_new_tokens=length + 1, min_new_tokens=length),
        stop_ids=(rival,),
        allowed=(range(forced, forced + 1),),
    )
    given = await answer(context.engine, wanted)
    if broken := faults([given]):
        return broken[0]
    won = given.finish_reason == "stop" and len(given.ids) == length
    if won != must_win:
        won_by = rival if won else forced
        return f"after {length} times id {forced}, {won_by} won against {forced if won else rival}"
    return None
