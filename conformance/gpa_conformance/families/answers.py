"""Requests run to their end, and what is wrong with an answer whatever the model says."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpa_conformance.context import Context, Skip
from gpa_conformance.prompts import Prompt
from gpa_engines.engine import Engine, GenerationRequest, GenerationUsage, SamplingParams, TokenDelta
from gpa_engines.sampling import candidate_ids

RUNAWAY = 64
"""Ids beyond max_new_tokens after which an answer is broken off."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. faults: how the stream breaks the contract, in words."""

    ids: tuple[int, ...]
    finish_reason: str | None
    usage: GenerationUsage | None
    faults: tuple[str, ...]


def request(prompt: Prompt, new_tokens: int, *, stop: bool = False, **sampling: Any) -> GenerationRequest:
    """Continue a prompt by `new_tokens` ids of those that its task allows; with `stop`, its stop ids end the answer."""
    return GenerationRequest(
        prompt.ids,
        SamplingParams(max_new_tokens=new_tokens, **sampling),
        prompt.stop_ids if stop else (),
        prompt.allowed,
    )


def unrestricted(wanted: GenerationRequest) -> GenerationRequest:
    """The same over the whole vocabulary."""
    return replace(wanted, allowed=None)


def fitting(context: Context, wanted: GenerationRequest) -> GenerationRequest:
    """The request as the engine can serve it; stop ids stay.

    Without its restriction where the engine cannot restrict; where it holds a part of the vocabulary, that part stands
    for the whole, and a request that needs others is a skip.
    """
    covered = context.covered
    if covered is not None:
        needed = candidate_ids(wanted.allowed, wanted.stop_ids)
        if wanted.allowed is None:
            wanted, needed = replace(wanted, allowed=context.engine.info.logit_ids), np.asarray(wanted.stop_ids)
        foreign = np.setdiff1d(np.asarray(needed, np.int64), covered)
        if len(foreign):
            raise Skip(f"the engine has no logits of id {foreign[0]}")
    return wanted if "allowed" in context.engine.info.capabilities else unrestricted(wanted)


async def answer(engine: Engine, wanted: GenerationRequest) -> Answer:
    """Run one request to its end. An answer that never ends is broken off and is a fault."""
    ids: list[int] = []
    deltas: list[TokenDelta] = []
    runaway = wanted.sampling.max_new_tokens + RUNAWAY
    async with aclosing(engine.generate(wanted)) as stream:
        async for delta in stream:
            deltas.append(delta)
            ids.extend(delta.ids)
            if len(ids) > runaway:
                break
    last = deltas[-1] if deltas else TokenDelta(())
    faults = tuple(_faults(wanted, ids, deltas, seeded="seed" in engine.info.capabilities))
    return Answer(tuple(ids), last.finish_reason, last.usage, faults)


async def answers(engine: Engine, wanted: Sequence[GenerationRequest], at_most: int | None = None) -> list[Answer]:
    """Run all requests at the same time, or `at_most` so many."""
    turn = asyncio.Semaphore(at_most or max(1, len(wanted)))

    async def run(each: GenerationRequest) -> Answer:
        async with turn:
            return await answer(engine, each)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(each)) for each in wanted]
    except BaseExceptionGroup as errors:
        raise _first(errors) from errors
    return [task.result() for task in tasks]


def faults(found: Iterable[Answer]) -> list[str]:
    """What is wrong with any of the streams, each said once."""
    return list(dict.fromkeys(fault for each in found for fault in each.faults))


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first id that differs, the shorter's length where one is the start of the other; None if equal."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def describe_difference(a: Sequence[int], b: Sequence[int]) -> str:
    """Where two answers part: "token 3 is 17, not 4"."""
    index = first_difference(a, b)
    if index is None:
        return "equal"
    first, second = (str(ids[index]) if index < len(ids) else "missing" for ids in (a, b))
    return f"token {index} is {first}, not {second}"


def _faults(
    wanted: GenerationRequest, ids: Sequence[int], deltas: Sequence[TokenDelta], *, seeded: bool
) -> Iterable[str]:
    sampling = wanted.sampling
    if not deltas:
        yield "the stream ended without a delta"
        return
    if len(ids) > sampling.max_new_tokens:
        yield f"{len(ids)} ids, though max_new_tokens is {sampling.max_new_tokens}"
    if any(delta.finish_reason is not None for delta in deltas[:-1]):
        yield "a delta followed the one with the finish reason"
    reason = deltas[-1].finish_reason
    if reason not in ("stop", "length"):
        yield f"the finish reason is {reason!r}; expected 'stop' or 'length'"
    if reason == "stop" and not wanted.stop_ids:
        yield "the finish reason is 'stop', though there is no stop id"
    if reason == "length" and len(ids) < sampling.max_new_tokens:
        yield f"the finish reason is 'length' after {len(ids)} ids, though max_new_tokens is {sampling.max_new_tokens}"
    if reason == "stop" and len(ids) < sampling.min_new_tokens:
        yield f"the answer stopped after {len(ids)} ids, though min_new_tokens is {sampling.min_new_tokens}"
    if emitted := sorted(set(ids) & set(wanted.stop_ids)):
        yield f"the stop id {emitted[0]} is part of the answer"
    if wanted.allowed is not None:
        outside = [token for token in ids if token not in wanted.stop_ids and not _inside(token, wanted.allowed)]
        if outside:
            yield f"id {outside[0]} is not allowed ({len(outside)} such ids)"
    yield from _usage_faults(wanted, ids, deltas[-1].usage, seeded)


def _usage_faults(
    wanted: GenerationRequest, ids: Sequence[int], usage: GenerationUsage | None, seeded: bool
) -> Iterable[str]:
    if usage is None:
        yield "the last delta has no usage"
        return
    if usage.prompt_tokens != len(wanted.prompt_ids):
        yield f"usage counts {usage.prompt_tokens} prompt tokens; there were {len(wanted.prompt_ids)}"
    if usage.new_tokens != len(ids):
        yield f"usage counts {usage.new_tokens} new tokens, the stream had {len(ids)}"
    if seeded and wanted.sampling.seed is not None and usage.seed != wanted.sampling.seed:
        yield f"usage says seed {usage.seed}; the request had {wanted.sampling.seed}"
    for name in ("queue", "prefill", "decode"):
        seconds = getattr(usage, name)
        if not (math.isfinite(seconds) and seconds >= 0):
            yield f"usage says {name} took {seconds} s"


def _inside(token: int, allowed: Sequence[range]) -> bool:
    return any(token in ids for ids in allowed)


def _first(errors: BaseExceptionGroup) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
