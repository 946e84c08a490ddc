"""What the tests of step engines share: requests, answers, and a model that is watched."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpa_engines.backends.torch.engine import CAPABILITIES, TorchStepModel
from gpa_engines.backends.torch.linear import weight_format
from gpa_engines.engine import Engine, EngineInfo, GenerationRequest, GenerationUsage, SamplingParams
from gpa_engines.lm_config import LMConfig
from gpa_engines.step_engine import StepEngine
from gpa_engines.step_model import Slot, SlotRequest, StepModel, StepRow

CPU = torch.device("cpu")


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


def mixed_requests(prompts: Sequence[dict[str, Any]], count: int) -> list[GenerationRequest]:
    """Prompts of many lengths; greedy and sampled, penalised and not, over the whole vocabulary and over a part."""
    requests = []
    for index in range(count):
        ids = prompts[index % len(prompts)]["input_ids"]
        ids = ids[: len(ids) - 7 * (index // len(prompts))]
        sampled = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": index} if index % 2 else {}
        penalty = 1.2 if index % 3 else 1.0
        sampling = SamplingParams(max_new_tokens=12 + 3 * (index % 7), repetition_penalty=penalty, **sampled)
        stop_ids, allowed = ((514,), (range(4816, 5141),)) if index % 4 >= 2 else ((), None)
        requests.append(GenerationRequest(tuple(ids), sampling, stop_ids, allowed))
    return requests


def load_model(folder: Path, dtype: str = "float32", *, max_tokens: int = 8192, max_batch: int = 16) -> TorchStepModel:
    config = LMConfig.from_file(folder / "config.json")
    return TorchStepModel(folder, config, weight_format(dtype, CPU), max_tokens=max_tokens, max_batch=max_batch)


def allocate(model: StepModel, positions: int) -> int:
    """A slot's number, where there is room."""
    slot = model.allocate(SlotRequest(positions, ()))
    assert slot is not None
    return slot.number


def every_row(slot: int, ids: Sequence[int], start: int) -> StepRow:
    """Feed ids and ask for the logits of each."""
    return StepRow(slot, ids, start, "at", offsets=range(len(ids)))


def relative_l2(x: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """||x - reference|| / ||reference||, in float64."""
    x64, reference64 = x.astype(np.float64), reference.astype(np.float64)
    return float(np.linalg.norm(x64 - reference64) / np.linalg.norm(reference64))


@dataclass
class WatchedModel:
    """A real step model whose steps are recorded, may be held up, and may be made to fail.

    steps: the rows of every step. held: slots in use. before_step: called with the number of steps so far and the rows.
    after_step: may replace results.
    """

    model: StepModel
    steps: list[list[StepRow]] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    before_step: Callable[[int, Sequence[StepRow]], None] = lambda number, rows: None
    after_step: Callable[[Sequence[StepRow], list[Any]], None] = lambda rows, results: None

    def __post_init__(self) -> None:
        self.vocab_size, self.max_context = self.model.vocab_size, self.model.max_context
        self.max_batch, self.max_tokens = self.model.max_batch, self.model.max_tokens
        self.thread: threading.Thread | None = None

    def allocate(self, request: SlotRequest) -> Slot | None:
        slot = self.model.allocate(request)
        if slot is not None:
            self.held.add(slot.number)
        return slot

    def release(self, slot: int) -> None:
        self.model.release(slot)
        self.held.remove(slot)

    def step(self, rows: Sequence[StepRow]) -> list[NDArray[np.float32] | None]:
        self.thread = threading.current_thread()
        self.before_step(len(self.steps), rows)
        self.steps.append(list(rows))
        results = self.model.step(rows)
        self.after_step(rows, results)
        return results

    def engine(self, prefill_chunk: int = 64, on_start: Callable[[], None] | None = None) -> StepEngine:
        info = EngineInfo("torch", "cpu", "float32", self.vocab_size, self.max_context, CAPABILITIES)
        return StepEngine(info, self, prefill_chunk=prefill_chunk, on_start=on_start)
