"""What an engine must refuse, with words, and live on."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable

from gpa_codecs.errors import GpaError
from gpa_conformance.cases import Case
from gpa_conformance.context import Context
from gpa_conformance.families.answers import Answer, answer, faults, fitting, request
from gpa_conformance.families.findings import Findings
from gpa_conformance.isolation import EngineDied
from gpa_engines.engine import GenerationRequest, SamplingParams

WORDS = 10
"""Characters that an error message must have to be one."""


async def empty_prompt(context: Context, case: Case, found: Findings) -> None:
    """No ids at all: for generation the request itself refuses, for logits the engine must."""
    wanted, before = await _reference(context, case)

    async def generate() -> object:
        empty = dataclasses.replace(wanted)
        object.__setattr__(empty, "prompt_ids", ())
        return await answer(context.engine, empty)

    attempts: list[tuple[str, Callable[[], Awaitable[object]]]] = [("generate with an empty prompt", generate)]
    if "logits" in context.engine.info.capabilities:
        attempts.append(("logits of no ids", lambda: context.engine.logits([])))
    await _refused(context, found, attempts)
    await _alive(context, found, wanted, before)


async def out_of_range(context: Context, case: Case, found: Findings) -> None:
    """Ids that no vocabulary row belongs to."""
    wanted, before = await _reference(context, case)
    size = context.engine.info.vocab_size
    sampling = wanted.sampling
    bad = {f"prompt id {token}": _with_prompt(wanted, (*wanted.prompt_ids, token)) for token in (-1, size, 2**31)}
    bad[f"stop id {size}"] = GenerationRequest(wanted.prompt_ids, sampling, (size,))
    bad[f"allowed up to id {size}"] = GenerationRequest(wanted.prompt_ids, sampling, (), (range(size - 2, size + 1),))
    attempts = [(name, _attempt(context, each)) for name, each in bad.items()]
    if "logits" in context.engine.info.capabilities:
        attempts += [(f"logits of id {token}", _logits(context, (1, token))) for token in (-1, size)]
    await _refused(context, found, attempts)
    await _alive(context, found, wanted, before)


async def too_long(context: Context, case: Case, found: Findings) -> None:
    """More positions than the context has, by the prompt alone and by prompt and answer together."""
    wanted, before = await _reference(context, case)
    positions = context.engine.info.max_context
    ids = (wanted.prompt_ids * (positions // len(wanted.prompt_ids) + 1))[: positions + 1]
    answer_too_long = dataclasses.replace(wanted, sampling=SamplingParams(max_new_tokens=positions))
    attempts = [
        (f"a prompt of {positions + 1} ids", _attempt(context, _with_prompt(wanted, ids))),
        (f"{len(wanted.prompt_ids)} ids and {positions} new tokens", _attempt(context, answer_too_long)),
    ]
    if "logits" in context.engine.info.capabilities:
        attempts.append((f"logits of {positions + 1} ids", _logits(context, ids)))
    await _refused(context, found, attempts)
    await _alive(context, found, wanted, before)


async def close(context: Context, case: Case, found: Findings) -> None:
    """Closing twice is harmless, and a closed engine refuses. The runner opens a new one for the next case."""
    wanted, _ = await _reference(context, case)
    complaints = []
    for time in ("once", "twice"):
        try:
            await context.engine.close()
        except Exception as error:
            if isinstance(error, EngineDied):
                raise
            complaints.append(f"closing {time} raised {type(error).__name__}: {error}")
    found.count("errors_of_close", complaints)
    attempts = [("generate after close", _attempt(context, wanted))]
    if "logits" in context.engine.info.capabilities:
        attempts.append(("logits after close", _logits(context, wanted.prompt_ids)))
    await _refused(context, found, attempts)


async def _reference(context: Context, case: Case) -> tuple[GenerationRequest, Answer]:
    """A good request and its answer, to be repeated after the bad ones."""
    (prompt,) = context.prompts(case).values()
    wanted = fitting(context, request(prompt, 4))
    return wanted, await answer(context.engine, wanted)


async def _refused(
    context: Context, found: Findings, attempts: Iterable[tuple[str, Callable[[], Awaitable[object]]]]
) -> None:
    """Every attempt must raise a GpaError or a ValueError that says something."""
    served, unclear, told = [], [], []
    for name, attempt in attempts:
        try:
            await attempt()
        except EngineDied:
            raise
        except (GpaError, ValueError) as error:
            if len(str(error)) < WORDS:
                unclear.append(f"{name}: {type(error).__name__} with the message {str(error)!r}")
            else:
                told.append({"attempt": name, "error": type(error).__name__, "message": str(error)})
        except Exception as error:
            unclear.append(
                f"{name}: {type(error).__name__} ({str(error)[:120]}); expected a RequestError or another GpaError"
            )
        else:
            served.append(f"{name} was served; expected a RequestError")
    found.count("served_though_impossible", served)
    found.count("unclear_refusals", unclear)
    found.table("refusals", told)


async def _alive(context: Context, found: Findings, wanted: GenerationRequest, before: Answer) -> None:
    """The good request gives what it gave before."""
    after = await answer(context.engine, wanted)
    changed = (
        [] if after.ids == before.ids else [f"after the refusals the engine answers {after.ids}, not {before.ids}"]
    )
    found.count("changed_answers", changed)
    found.count("stream_faults", faults([before, after]))


def _attempt(context: Context, wanted: GenerationRequest) -> Callable[[], Awaitable[object]]:
    return lambda: answer(context.engine, wanted)


def _logits(context: Context, ids: tuple[int, ...]) -> Callable[[], Awaitable[object]]:
    return lambda: context.engine.logits(ids)


def _with_prompt(wanted: GenerationRequest, ids: tuple[int, ...]) -> GenerationRequest:
    return dataclasses.replace(wanted, prompt_ids=ids)
