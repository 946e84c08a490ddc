"""An engine that holds a part of the vocabulary is judged by that part: neither failed for the rest, nor excused."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gpa_codecs.errors import RequestError
from gpa_codecs.prompts import task_tokens
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.engine import EngineInfo, GenerationRequest, TokenDelta
from gpa_engines.sampling import candidate_ids
from tests.conformance.faults.altered_requests import Altered
from tests.conformance.faults.suite import Suite

CASES = "logits,cache,batch,generate,contract,sampling,long"


class SpeechOnly(Altered):
    """The torch engine with the ids of tts-a alone."""

    def __init__(self, model_dir: Path, *, dtype: str) -> None:
        super().__init__(model_dir, dtype=dtype)
        stops, allowed = task_tokens(TokenSpace.from_file(model_dir / "tokenizer.json"), "tts-a")
        ids = candidate_ids(allowed, stops)
        assert ids is not None
        self.ids = ids
        starts = np.flatnonzero(np.diff(self.ids, prepend=-2) != 1)
        ends = [*starts[1:], len(self.ids)]
        self.parts = tuple(range(int(self.ids[a]), int(self.ids[b - 1]) + 1) for a, b in zip(starts, ends, strict=True))

    @property
    def info(self) -> EngineInfo:
        return replace(self.engine.info, logit_ids=self.parts)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        needed = candidate_ids(request.allowed, request.stop_ids)
        if needed is None or not np.isin(needed, self.ids).all():
            raise RequestError("only the ids of speech are here")
        async for delta in super().generate(request):
            yield delta

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self.spoil(await self.engine.logits(ids))

    def spoil(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        masked = np.full_like(rows, -np.inf)
        masked[:, self.ids] = rows[:, self.ids]
        return masked


class SpeechOnlyLastColumnWrong(SpeechOnly):
    def spoil(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        masked = super().spoil(rows)
        masked[:, self.ids[-1]] -= 3.0
        return masked


class SpeechOnlyWithOthersAtZero(SpeechOnly):
    """Zeros instead of -inf where there is no logit: a sampler could draw such an id."""

    def spoil(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.nan_to_num(super().spoil(rows), neginf=0.0)


def run(suite: Suite, name: str, cases: str = CASES) -> dict[str, tuple[str, str]]:
    report = suite.run(suite.planted(f"test_partial_vocabulary:{name}", "float32"), cases)
    return {each.case: (each.status, each.reason) for each in report.cases}


def test_a_healthy_part_passes_what_it_can_run(suite: Suite) -> None:
    outcomes = run(suite, "SpeechOnly")
    assert {name: each for name, each in outcomes.items() if each[0] not in ("passed", "skipped")} == {}
    passed = {name for name, (status, _) in outcomes.items() if status == "passed"}
    assert {"logits/ascend-1", "logits/tts-english", "cache/prefixes", "generate/tts"} <= passed
    assert {"batch/eight", "contract/stop", "contract/out-of-range", "sampling/plain"} & passed
    assert "part" in outcomes["generate/ascend-1"][1]
    assert "the engine has no logits of id" in outcomes["generate/stt"][1]


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("SpeechOnlyLastColumnWrong", "logits/ascend-1,logits/tts-english"),
        ("SpeechOnlyWithOthersAtZero", "contract/vocabulary"),
    ],
)
def test_a_fault_within_the_part_is_caught(suite: Suite, name: str, cases: str) -> None:
    assert {status for status, _ in run(suite, name, cases).values()} == {"failed"}
