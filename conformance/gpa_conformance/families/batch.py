"""Family "batch": a request's tokens do not depend on what else runs (see :mod:`gpa_conformance.families.company`)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing

from gpa_conformance.cases import Case
from gpa_conformance.context import Context
from gpa_conformance.families.answers import Answer, answer, answers, faults, fitting, request
from gpa_conformance.families.company import Pair, compare
from gpa_conformance.families.findings import Findings
from gpa_conformance.results import CaseResult
from gpa_engines.engine import FinishReason, GenerationRequest


async def run(context: Context, case: Case) -> CaseResult:
    """Kinds: "together-as-alone", "other-neighbours", "joins-late"."""
    found = Findings(case)
    if "batch" not in context.engine.info.capabilities:
        found.note("no batch: the engine runs concurrent requests one after the other")
    match case.kind:
        case "together-as-alone":
            await _run_together(context, case, found)
        case "other-neighbours":
            await _run_neighbours(context, case, found)
        case "joins-late":
            await _run_late(context, case, found)
        case kind:
            raise ValueError(f"case {case.id} has the kind {kind!r}")
    return found.result()


async def _run_together(context: Context, case: Case, found: Findings) -> None:
    requests = _requests(context, case, case.prompts)
    alone = {name: await answer(context.engine, wanted) for name, wanted in requests.items()}
    together = await answers(context.engine, list(requests.values()))
    backwards = await answers(context.engine, list(requests.values())[::-1])
    await _compare(context, found, requests, alone, dict(zip(requests, together, strict=True)), "together")
    await _compare(
        context, found, requests, alone, dict(zip(requests, backwards[::-1], strict=True)), "in reverse order"
    )


async def _run_neighbours(context: Context, case: Case, found: Findings) -> None:
    (name,) = case.prompts
    requests = _requests(context, case, case.prompts)
    alone = {name: await answer(context.engine, requests[name])}
    for number, neighbours in enumerate(case.spec["neighbours"]):
        others = _requests(context, case, neighbours)
        given, *_ = await answers(context.engine, [requests[name], *others.values()])
        await _compare(context, found, requests, alone, {name: given}, f"beside neighbours {number + 1}")


async def _run_late(context: Context, case: Case, found: Findings) -> None:
    """The last prompt's request is sent when the first one has decoded some tokens."""
    requests = _requests(context, case, case.prompts)
    alone = {name: await answer(context.engine, wanted) for name, wanted in requests.items()}
    started = asyncio.Event()

    async def watch(wanted: GenerationRequest) -> tuple[tuple[int, ...], FinishReason | None]:
        ids: list[int] = []
        reason: FinishReason | None = None
        async with aclosing(context.engine.generate(wanted)) as stream:
            async for delta in stream:
                ids.extend(delta.ids)
                reason = delta.finish_reason
                if len(ids) >= case.spec["delay_tokens"] or reason is not None:
                    started.set()
        return tuple(ids), reason

    async def join(wanted: GenerationRequest) -> Answer:
        await started.wait()
        return await answer(context.engine, wanted)

    first, *between, last = requests
    async with asyncio.TaskGroup() as group:
        watched = group.create_task(watch(requests[first]))
        others = [group.create_task(answer(context.engine, requests[name])) for name in between]
        late = group.create_task(join(requests[last]))
    given = dict(zip((*between, last), [task.result() for task in (*others, late)], strict=True))
    given[first] = Answer(*watched.result(), None, ())
    await _compare(context, found, requests, alone, given, "with one that joins late")


def _requests(context: Context, case: Case, names: Sequence[str]) -> dict[str, GenerationRequest]:
    """A request per prompt; sampled ones have a seed each."""
    sampling = case.spec["sampling"]
    if sampling.get("temperature", 0):
        context.need("seed")
    first = case.spec.get("seed", 0) + context.seed
    seeds = {name: {"seed": first + index} if sampling else {} for index, name in enumerate(names)}
    return {
        name: fitting(context, request(context.prompt(name), case.spec["new_tokens"], **sampling, **seeds[name]))
        for name in names
    }


async def _compare(
    context: Context,
    found: Findings,
    requests: Mapping[str, GenerationRequest],
    alone: Mapping[str, Answer],
    given: Mapping[str, Answer],
    how: str,
) -> None:
    """Checks that every answer is the one that was given alone."""
    pairs = {f"{name} {how}": Pair(requests[name], alone[name], other) for name, other in given.items()}
    await compare(context, found, f"answers that differ {how}", pairs)
    found.count(f"stream faults {how}", faults([*alone.values(), *given.values()]))
