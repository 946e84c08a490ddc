"""Requests and answers for the tests of the llama.cpp engine, without torch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_engines.backends.llama_cpp.engine import LlamaStepModel, Settings, load_model
from gpa_engines.backends.llama_cpp.lane import FIRST_STREAMS
from gpa_engines.engine import Engine, GenerationRequest, GenerationUsage, SamplingParams
from gpa_engines.step_model import CandidateSet, Slot, SlotRequest, StepRow

SEMANTIC = range(4816, 5136)
IM_END = 514


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    ids: tuple[int, ...]
    finish_reason: str
    usage: GenerationUsage


async def answer(engine: Engine, request: GenerationRequest) -> Answer:
    """Run one request to its end."""
    ids: list[int] = []
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            ids.extend(delta.ids)
            if delta.finish_reason is not None:
                assert delta.usage is not None
                return Answer(tuple(ids), delta.finish_reason, delta.usage)
    raise AssertionError("the stream ended without a finish reason")


async def answers(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """Run all requests at the same time."""
    return list(await asyncio.gather(*(answer(engine, request) for request in requests)))


def request(prompt_ids: Sequence[int], max_new_tokens: int = 24, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(tuple(prompt_ids), SamplingParams(max_new_tokens=max_new_tokens, **sampling))


def speech_request(prompt_ids: Sequence[int], max_new_tokens: int = 24, **sampling: Any) -> GenerationRequest:
    """What tts-a and vc ask for: semantic ids and the end token."""
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
    return GenerationRequest(tuple(prompt_ids), params, (IM_END,), (SEMANTIC,))


def mixed_requests(prompts: Sequence[dict[str, Any]], count: int) -> list[GenerationRequest]:
    """Prompts of many lengths; greedy and sampled, penalised and not, over the whole vocabulary and over a part."""
    requests = []
    for index in range(count):
        ids = prompts[index % len(prompts)]["input_ids"]
        ids = ids[: len(ids) - 7 * (index // len(prompts))]
        sampled = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": index} if index % 2 else {}
        penalty = 1.2 if index % 3 else 1.0
        build = speech_request if index % 4 >= 2 else request
        requests.append(build(ids, 12 + 3 * (index % 7), repetition_penalty=penalty, **sampled))
    return requests


def load(model: Path, prefill_chunk: int = 64, **options: Any) -> LlamaStepModel:
    """The step model of files, without an engine around it."""
    defaults: dict[str, Any] = {
        "dtype": "auto",
        "mode": "auto",
        "threads": 1,
        "max_tokens_in_flight": 4096,
        "max_batch": 8,
        "n_gpu_layers": 0,
        "flash_attention": None,
        "prefix_reuse": True,
    }
    return load_model(model, Settings(**(defaults | options), prefill_chunk=prefill_chunk))[1]


def allocate(
    model: LlamaStepModel,
    prompt: Sequence[int],
    *,
    positions: int | None = None,
    candidates: CandidateSet | None = None,
    reuse: bool = True,
) -> Slot:
    """A slot where there is room: of 16 positions more than the prompt unless another number is given."""
    slot = model.allocate(SlotRequest(positions or len(prompt) + 16, prompt, candidates, reuse))
    assert slot is not None
    return slot


def crowd(model: LlamaStepModel) -> None:
    """Ask for a slot more than the cache begins with, so that it is made whole for the next request."""
    slots = [allocate(model, [1, 2, 3]) for _ in range(FIRST_STREAMS)]
    assert model.allocate(SlotRequest(19, [1, 2, 3], None, True)) is None
    for slot in slots:
        model.release(slot.number)


def last_logits(model: LlamaStepModel, slot: Slot, prompt: Sequence[int]) -> NDArray[np.float32]:
    """Feed what the slot does not hold yet in pieces that end at multiples of 64; the last row."""
    row, start = None, slot.filled
    while start < len(prompt):
        ids = prompt[start : start // 64 * 64 + 64]
        wanted = "last" if start + len(ids) == len(prompt) else "none"
        (row,) = model.step([StepRow(slot.number, ids, start, wanted)])
        start += len(ids)
    assert row is not None
    return row


def relative_l2(x: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """||x - reference|| / ||reference||, in float64."""
    x64, reference64 = x.astype(np.float64), reference.astype(np.float64)
    return float(np.linalg.norm(x64 - reference64) / np.linalg.norm(reference64))
