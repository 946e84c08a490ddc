"""What the tests over real servers share: prompts, and streams whose every token is held against the whole answer."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import numpy as np

from gpa_codecs.errors import RequestError
from gpa_engines.engine import Engine, GenerationRequest
from tests.servers.asking import Answer


def prompts(count: int) -> list[tuple[int, ...]]:
    """Of 5 to 5 + 3 * count ids from all over the vocabulary."""
    random = np.random.default_rng(7)
    return [tuple(random.integers(0, 5141, 5 + 3 * index).tolist()) for index in range(count)]


def outcomes_of(given: list[Any], expected: list[Answer]) -> tuple[int, list[RequestError]]:
    """(whole answers, clear errors); anything else fails."""
    errors = []
    for outcome, whole in zip(given, expected, strict=True):
        if isinstance(outcome, Answer):
            assert outcome.ids == whole.ids
        else:
            assert isinstance(outcome, RequestError), repr(outcome)
            assert "127.0.0.1" in str(outcome)
            errors.append(outcome)
    return len(given) - len(errors), errors


async def watch(engine: Engine, wanted: GenerationRequest, whole: Answer, counts: list[int], index: int) -> Answer:
    """Run a request, every token of which must be right also if it ends in an error; counts them at `index`."""
    ids: list[int] = []
    async with aclosing(engine.generate(wanted)) as deltas:
        async for delta in deltas:
            ids.extend(delta.ids)
            counts[index] = len(ids)
            assert tuple(ids) == whole.ids[: len(ids)], "a wrong token"
            if delta.finish_reason is not None:
                assert delta.usage is not None
                return Answer(tuple(ids), delta.finish_reason, delta.usage)
    raise AssertionError("the stream ended without a word")
