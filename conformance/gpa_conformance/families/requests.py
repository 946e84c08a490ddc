"""What an engine must do with a request that it can serve."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from gpa_conformance.cases import Case
from gpa_conformance.context import Context
from gpa_conformance.families.answers import Answer, answer, answers, describe_difference, faults, fitting, request
from gpa_conformance.families.company import Pair, compare
from gpa_conformance.families.findings import Findings
from gpa_conformance.prompts import Prompt
from gpa_conformance.wire import WrongShape
from gpa_engines.engine import GenerationRequest, SamplingParams


async def stop(context: Context, case: Case, found: Findings) -> None:
    """Every id of a free answer, made the stop id, ends the answer before its first occurrence."""
    complaints, given = [], []
    for name, prompt in context.prompts(case).items():
        wanted = fitting(context, request(prompt, case.spec["new_tokens"]))
        free = await answer(context.engine, wanted)
        given.append(free)
        for number, token in enumerate(dict.fromkeys(free.ids)):
            # Every other time a second stop id, which greedy decoding does not choose, must change nothing.
            stops = (token,) if number % 2 == 0 else (token, _unchosen(free.ids, wanted, context))
            stopped = await answer(context.engine, replace(wanted, stop_ids=stops))
            given.append(stopped)
            expected = free.ids[: free.ids.index(token)]
            if stopped.ids != expected or stopped.finish_reason != "stop":
                complaints.append(
                    f"{name} with stop id {token}: {len(stopped.ids)} ids and reason {stopped.finish_reason!r}, "
                    f"expected {len(expected)} and 'stop' ({describe_difference(stopped.ids, expected)})"
                )
    found.count("wrong_stops", complaints)
    found.count("stream_faults", faults(given))


def _unchosen(ids: Sequence[int], wanted: GenerationRequest, context: Context) -> int:
    """An id that the answer does not hold."""
    possible = range(context.engine.info.vocab_size) if wanted.allowed is None else wanted.allowed[0]
    return next(token for token in possible if token not in ids)


async def max_new_tokens(context: Context, case: Case, found: Findings) -> None:
    """Exactly as many ids as asked for, each answer the start of the longest."""
    complaints, given = [], []
    for name, prompt in context.prompts(case).items():
        lengths = sorted(case.spec["lengths"])
        for length in lengths:
            given.append(await answer(context.engine, fitting(context, request(prompt, length))))
            if len(given[-1].ids) != length or given[-1].finish_reason != "length":
                complaints.append(
                    f"{name}: {len(given[-1].ids)} ids, reason {given[-1].finish_reason!r}; asked for {length}"
                )
        longest = given[-1].ids
        complaints += [
            f"{name}: the answer of {len(each.ids)} ids is not the start of that of {len(longest)}"
            for each in given[-len(lengths) :]
            if each.ids != longest[: len(each.ids)]
        ]
    found.count("wrong_lengths", complaints)
    found.count("stream_faults", faults(given))


async def min_new_tokens(context: Context, case: Case, found: Findings) -> None:
    """A stop id that greedy decoding would choose at once comes only after the minimum."""
    complaints, given = [], []
    least, most = case.spec["min_new_tokens"], case.spec["new_tokens"]
    for name, prompt in context.prompts(case).items():
        wanted = fitting(context, request(prompt, most))
        first = (await answer(context.engine, fitting(context, request(prompt, 1)))).ids[0]
        at_once = await answer(context.engine, replace(wanted, stop_ids=(first,)))
        if at_once.ids or at_once.finish_reason != "stop":
            complaints.append(f"{name}: with its first token as stop id the answer has {len(at_once.ids)} ids, not 0")
        sampling = replace(wanted.sampling, min_new_tokens=least)
        held = await answer(context.engine, replace(wanted, sampling=sampling, stop_ids=(first,)))
        if len(held.ids) < least:
            complaints.append(f"{name}: {len(held.ids)} ids, though min_new_tokens is {least}")
        given += [at_once, held]
    found.count("wrong_lengths", complaints)
    found.count("stream_faults", faults(given))


async def one_token(context: Context, case: Case, found: Findings) -> None:
    """The shortest prompt gives an answer, and one row of logits."""
    for name, prompt in context.prompts(case).items():
        short = replace(prompt, ids=prompt.ids[:1])
        given = await answer(context.engine, fitting(context, request(short, case.spec["new_tokens"])))
        found.check(f"new_tokens of {name}", len(given.ids), "==", case.spec["new_tokens"])
        found.count(f"stream_faults of {name}", given.faults)
        if "logits" in context.engine.info.capabilities and given.ids:
            row = await context.last_row(short.ids)
            regret = float(row.max() - row[given.ids[0]])
            found.add([context.limits.check("regret_max", regret)])


async def usage(context: Context, case: Case, found: Findings) -> None:
    """The figures of a request, for a greedy and a sampled one; deltas that repeat or lose no id."""
    complaints, given = [], []
    for name, prompt in context.prompts(case).items():
        wanted = fitting(context, request(prompt, case.spec["new_tokens"]))
        sampled = replace(wanted, sampling=replace(wanted.sampling, temperature=1.0, seed=17))
        for each in (wanted, sampled):
            first, second = [await answer(context.engine, each) for _ in range(2)]
            given += [first, second]
            if each is wanted and first.ids != second.ids:
                complaints.append(f"{name}: twice asked, {describe_difference(second.ids, first.ids)}")
        if "logits" in context.engine.info.capabilities:
            complaints += await _repeated(context, wanted, given[-4], name)
    found.count("repeated_or_lost_ids", complaints)
    found.count("stream_faults", faults(given))


async def _repeated(context: Context, wanted: GenerationRequest, given: Answer, name: str) -> list[str]:
    """Greedy ids that are not the best of their row, told as a repetition where the id before was the same."""
    if not given.ids:
        return [f"{name}: no ids"]
    at = range(len(wanted.prompt_ids) - 1, len(wanted.prompt_ids) - 1 + len(given.ids))
    rows = await context.rows((*wanted.prompt_ids, *given.ids[:-1]), at)
    limit = context.limits["regret_max"].value
    complaints = []
    for step, (row, token) in enumerate(zip(rows, given.ids, strict=True)):
        possible = row if wanted.allowed is None else np.concatenate([row[r.start : r.stop] for r in wanted.allowed])
        if not float(possible.max() - row[token]) <= limit:
            again = " again" if step and given.ids[step - 1] == token else ""
            complaints.append(f"{name}: token {step} is {token}{again}, which the prefill does not prefer")
    return complaints


async def allowed(context: Context, case: Case, found: Findings) -> None:
    """Nothing but allowed ids, whatever the restriction and however hot the sampling."""
    context.need("allowed")
    restrictions = _restrictions(context)
    given: list[Answer] = []
    for prompt in context.prompts(case).values():
        sampling = SamplingParams(max_new_tokens=case.spec["new_tokens"], **case.spec["sampling"])
        wanted = [GenerationRequest(prompt.ids, sampling, allowed=each) for each in restrictions]
        wanted += [replace(each, sampling=replace(sampling, temperature=0.0)) for each in wanted]
        given += await answers(context.engine, wanted)
    found.metrics["answers"] = float(len(given))
    found.metrics["ids"] = float(sum(len(each.ids) for each in given))
    found.count("stream_faults", faults(given))


def _restrictions(context: Context) -> list[tuple[range, ...]]:
    """One id, two ranges, and each audio family, of the ids that the engine has."""
    covered = context.covered
    ids = np.arange(context.engine.info.vocab_size) if covered is None else covered
    middle, first, last = (int(ids[at]) for at in (len(ids) // 2, 3, -5))
    wanted = [(range(middle, middle + 1),), (range(first, first + 8), range(last, int(ids[-1]) + 1))]
    if context.space is not None:
        wanted += [(family.range,) for family in (context.space.glm, context.space.global_, context.space.semantic)]
    return [parts for parts in wanted if all(np.isin(np.arange(part.start, part.stop), ids).all() for part in parts)]


async def seed(context: Context, case: Case, found: Findings) -> None:
    """The same seed, the same tokens; another seed, others; without one, the seed that is reported repeats the run."""
    context.need("seed")
    complaints, given = [], []
    for name, prompt in context.prompts(case).items():
        by_seed: dict[tuple[int, ...], int] = {}
        for number in case.spec["seeds"]:
            wanted = _seeded(context, case, prompt, number + context.seed)
            first, second = [await answer(context.engine, wanted) for _ in range(2)]
            given += [first, second]
            if first.ids != second.ids:
                complaints.append(f"{name}, seed {number} twice: {describe_difference(second.ids, first.ids)}")
            if first.ids in by_seed:
                complaints.append(f"{name}: seeds {by_seed[first.ids]} and {number} give the same answer")
            by_seed[first.ids] = number
        fresh = [await answer(context.engine, _seeded(context, case, prompt, None)) for _ in range(2)]
        given += fresh
        if fresh[0].ids == fresh[1].ids:
            complaints.append(f"{name}: two requests without a seed give the same answer")
        if (reported := fresh[0].usage) is not None:
            again = await answer(context.engine, _seeded(context, case, prompt, reported.seed))
            if again.ids != fresh[0].ids:
                complaints.append(f"{name}: the seed {reported.seed} that was reported does not give the answer again")
    found.count("wrong_seeds", complaints)
    found.count("stream_faults", faults(given))


def _seeded(context: Context, case: Case, prompt: Prompt, number: int | None) -> GenerationRequest:
    return fitting(context, request(prompt, case.spec["new_tokens"], seed=number, **case.spec["sampling"]))


async def repeat(context: Context, case: Case, found: Findings) -> None:
    """The same greedy request several times, one after the other."""
    complaints, given = [], []
    for name, prompt in context.prompts(case).items():
        wanted = fitting(context, request(prompt, case.spec["new_tokens"]))
        times = [await answer(context.engine, wanted) for _ in range(case.spec["times"])]
        given += times
        complaints += [
            f"{name}, time {number}: {describe_difference(each.ids, times[0].ids)}"
            for number, each in enumerate(times[1:], 2)
            if each.ids != times[0].ids
        ]
    found.count("changed_answers", complaints)
    found.count("stream_faults", faults(given))


async def concurrent(context: Context, case: Case, found: Findings) -> None:
    """More requests at once than run at a time: each as alone."""
    prompts = context.prompts(case)
    count = case.spec["requests"]
    wanted: dict[str, GenerationRequest] = {}
    for number in range(count):
        name, prompt = list(prompts.items())[number % len(prompts)]
        # Lengths differ, so that requests leave and join at different steps; half of them sample.
        length = case.spec["new_tokens"] - number % 3
        sampling = {"temperature": 0.9, "seed": number + context.seed} if number % 2 and _seeds(context) else {}
        wanted[f"{name} as request {number}"] = fitting(context, request(prompt, length, **sampling))
    alone = [await answer(context.engine, each) for each in wanted.values()]
    together = await answers(context.engine, list(wanted.values()))
    found.metrics["requests"] = count
    pairs = {name: Pair(wanted[name], *each) for name, *each in zip(wanted, alone, together, strict=True)}
    await compare(context, found, "differing_answers", pairs)
    found.count("stream_faults", faults([*alone, *together]))


def _seeds(context: Context) -> bool:
    return "seed" in context.engine.info.capabilities


PATIENCE = 2.0
"""Seconds that breaking off may take beyond three times the expected."""

ATTEMPTS = 2
"""Times that breaking off is timed, so that a busy machine alone does not make it slow."""


async def cancel(context: Context, case: Case, found: Findings) -> None:
    """Requests broken off after their first token, one by one and many at once, leave room for a full batch."""
    complaints: list[str] = []
    (prompt,) = context.prompts(case).values()
    room = context.engine.info.max_context - len(prompt.ids)
    doomed = fitting(context, request(prompt, min(case.spec["new_tokens"], room)))
    wanted = [fitting(context, request(replace(prompt, ids=(*prompt.ids, *prompt.ids[:n])), 8)) for n in range(8)]
    before = await answers(context.engine, wanted)
    times = case.spec["times"]
    # On a busy machine single requests vary by a factor; their median is what the many will take on average.
    one = statistics.median([await _break_off(context, doomed) for _ in range(7)])
    patience, seconds = 3 * 1.5 * times * one + PATIENCE, math.inf
    for _ in range(ATTEMPTS):
        started = time.monotonic()
        for _ in range(times):
            await _break_off(context, doomed)
        await asyncio.gather(*(_break_off(context, doomed) for _ in range(times // 2)))
        seconds = min(seconds, time.monotonic() - started)
        if seconds <= patience:
            break
    after = await answers(context.engine, wanted)
    complaints += [
        f"after {times} cancelled requests: {describe_difference(now.ids, then.ids)}, as before"
        for now, then in zip(after, before, strict=True)
        if now.ids != then.ids
    ]
    found.count("changed_answers", complaints)
    found.count("stream_faults", faults([*before, *after]))
    if not found.check("seconds_of_cancelling", seconds, "<=", patience).passed:
        found.complain(
            f"{times + times // 2} requests that were cancelled after their first token took {seconds:.2g} s, one "
            f"alone {one:.2g} s: the cancelled ones still run, or hold what the others need"
        )


async def _break_off(context: Context, wanted: GenerationRequest) -> float:
    """Seconds until the first token was there and the rest cancelled."""
    started = time.monotonic()
    async with aclosing(context.engine.generate(wanted)) as stream:
        async for _ in stream:
            break
    return time.monotonic() - started


async def vocabulary(context: Context, case: Case, found: Findings) -> None:
    """float32[T, V], unnormalised."""
    context.need("logits")
    for name, prompt in context.prompts(case).items():
        try:
            rows = await context.rows(prompt.ids, range(len(prompt.ids)))
            whole = await context.whole(prompt.ids)
        except WrongShape as error:
            found.count("wrong_shape", [f"{name}: {error}"])
            return
        covered = context.covered
        if covered is not None:
            others = np.delete(rows, covered, axis=1)
            found.check(f"logits of ids that {name} lacks", float((others != -np.inf).sum()), "==", 0)
            rows, whole = context.cut(rows), context.cut(whole)
        # Other cases ask for single rows where an engine offers them: these must be the rows of `logits`.
        apart = float(np.nanmax(np.abs(whole - rows), initial=0.0)) / max(float(np.nanmax(np.abs(whole))), 1e-9)
        found.check(f"logits_at of {name}", apart, "<=", context.limits["rel_l2_max"].value, context.limits.name)
        finite = np.isfinite(rows)
        found.check(f"non_finite of {name}", float(rows.size - finite.sum()), "==", 0, "a NaN is never right")
        if finite.all():
            wide = rows.astype(np.float64)
            sums = wide.max(1) + np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1))
            found.check(
                f"log-sum-exp of {name}", float(np.abs(sums).max()), ">=", 0.1, "0 is that of log-probabilities"
            )
