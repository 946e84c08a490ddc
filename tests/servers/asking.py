"""Requests and answers for the tests of server engines, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from gpa_engines.engine import Engine, GenerationRequest, GenerationUsage, SamplingParams


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    ids: tuple[int, ...]
    finish_reason: str
    usage: GenerationUsage


async def answer(engine: Engine, request: GenerationRequest) -> Answer:
    """Run one request until its stream ends."""
    ids: list[int] = []
    given: Answer | None = None
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            assert given is None, "something came after the last delta"
            ids.extend(delta.ids)
            if delta.finish_reason is not None:
                assert delta.usage is not None
                given = Answer(tuple(ids), delta.finish_reason, delta.usage)
    assert given is not None, "the stream ended without a finish reason"
    return given


def request(prompt_ids: Sequence[int], max_new_tokens: int = 24, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(tuple(prompt_ids), SamplingParams(max_new_tokens=max_new_tokens, **sampling))
