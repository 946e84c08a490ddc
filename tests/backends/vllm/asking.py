"""Requests and answers for the tests of the vLLM engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from gpa_engines.engine import Engine, GenerationRequest, GenerationUsage, SamplingParams

SEMANTIC = range(4816, 5136)
IM_END = 514
"""Of the tiny checkpoint; the latter is also the end token in its config.json and generation_config.json."""

PROMPT = tuple(range(700, 740))


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. deltas: how many it came in."""

    ids: tuple[int, ...]
    finish_reason: str
    usage: GenerationUsage
    deltas: int


async def answer(engine: Engine, request: GenerationRequest) -> Answer:
    """Run one request to its end."""
    ids: list[int] = []
    deltas = 0
    async with aclosing(engine.generate(request)) as stream:
        async for delta in stream:
            ids.extend(delta.ids)
            deltas += 1
            if delta.finish_reason is not None:
                assert delta.usage is not None
                return Answer(tuple(ids), delta.finish_reason, delta.usage, deltas)
    raise AssertionError("the stream ended without a finish reason")


async def answers(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """Run all requests at the same time."""
    return list(await asyncio.gather(*(answer(engine, request) for request in requests)))


def request(prompt_ids: Sequence[int] = PROMPT, max_new_tokens: int = 12, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(tuple(prompt_ids), SamplingParams(max_new_tokens=max_new_tokens, **sampling))


def speech_request(prompt_ids: Sequence[int], max_new_tokens: int = 12, **sampling: Any) -> GenerationRequest:
    """What tts-a and vc ask for: semantic ids and the end token."""
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
    return GenerationRequest(tuple(prompt_ids), params, (IM_END,), (SEMANTIC,))


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    """Ids all over the vocabulary, repeating none of the first 600, where the special tokens are."""
    return tuple(600 + (index * 131 + seed * 977) % 4500 for index in range(length))


def mixed_requests(count: int) -> list[GenerationRequest]:
    """Prompts of many lengths; greedy and sampled, penalised and not, over the whole vocabulary and over a part."""
    requests = []
    for index in range(count):
        sampled = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": index} if index % 2 else {}
        build = speech_request if index % 4 >= 2 else request
        penalty = 1.2 if index % 3 else 1.0
        length = 5 + 37 * (index % 9)
        requests.append(build(prompt_of(length, index), 8 + index % 7, repetition_penalty=penalty, **sampled))
    return requests
