"""What the reference answers: logits, greedy ids with margins, codes that small noise does not change."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.audio import Waveform, load_audio
from gpa_codecs.codec import SpeechCodec
from gpa_conformance.baseline.reading import BaselineError
from gpa_conformance.cases import Case
from gpa_conformance.prompts import ClipCodes, Prompt
from gpa_conformance.reference_rows import Top, TopRows, best_ids
from gpa_conformance.rows import rows_at
from gpa_conformance.wire import WrongShape
from gpa_engines.engine import Engine, FinishReason, GenerationRequest, SamplingParams

CONTRADICTION = 1e-3
"""Nats by which a decoded token may be worse than the prefill's best: float32 rounding, a hundred times over."""

NOISE = 1e-5
"""Noise of `stable` codes, as a share of the clip's level: more than float32 features of two programs differ."""

REPEATS = 2


@dataclass(frozen=True, slots=True)
class Greedy:
    """As GreedyReference, without the prompt."""

    ids: NDArray[np.int64]
    margins: NDArray[np.float64]
    top5: NDArray[np.int64]
    finish_reason: FinishReason


async def reference_logits(
    engine: Engine, case: Case, ids: tuple[int, ...], positions: NDArray[np.int64]
) -> NDArray[np.float32]:
    """float32[P, V] at `positions`. Raises BaselineError when shape or values are not what a reference may give."""
    try:
        logits = await rows_at(engine, ids, positions)
    except WrongShape as error:
        raise BaselineError(f"{case.id}: the reference is no Engine: {error}") from error
    for position, row in zip(positions, logits, strict=True):
        if not np.isfinite(row).all():
            raise BaselineError(f"{case.id}: the reference's logits are not finite at position {position}")
    return logits


async def greedy_answer(engine: Engine, case: Case, prompt: Prompt) -> Greedy:
    """The greedy answer, with margins and the best five from the logits of prompt and answer at once.

    Raises BaselineError when the two contradict each other: such an engine cannot be a reference.
    """
    sampling = SamplingParams(max_new_tokens=case.spec["new_tokens"], **case.spec["sampling"])
    request = GenerationRequest(prompt.ids, sampling, prompt.stop_ids, prompt.allowed)
    ids: list[int] = []
    reason: FinishReason = "length"
    async for delta in engine.generate(request):
        ids.extend(delta.ids)
        reason = delta.finish_reason or reason
    steps = len(ids) + (reason == "stop")
    at = np.arange(len(prompt.ids) - 1, len(prompt.ids) - 1 + steps)
    logits = await reference_logits(engine, case, (*prompt.ids, *ids[: steps - 1]), at)
    candidates = prompt.candidates()
    margins, top5 = np.empty(steps), np.full((steps, 5), -1, np.int64)
    for step in range(steps):
        row = logits[step]
        scores = penalised(row, (*prompt.ids, *ids[:step]), sampling.repetition_penalty)
        possible = np.arange(len(scores)) if candidates is None else candidates
        best = possible[best_ids(scores[possible], 5)]
        top5[step, : len(best)] = best
        margins[step] = float(scores[best[0]]) - float(scores[best[1]]) if len(best) > 1 else np.inf
        chosen = ids[step] if step < len(ids) else max(prompt.stop_ids, key=lambda stop: scores[stop])
        if not scores[best[0]] - scores[chosen] <= CONTRADICTION:
            raise BaselineError(
                f"{case.id}: the reference decodes {chosen} at step {step}, but its own prefill prefers {best[0]} by "
                f"{scores[best[0]] - scores[chosen]:.3g}; it cannot be a reference"
            )
    return Greedy(np.asarray(ids, np.int64), margins, top5, reason)


async def plain_answers(engine: Engine, wanted: Sequence[GenerationRequest]) -> list[list[int]]:
    """The ids of all answers, asked for at the same time."""

    async def one(request: GenerationRequest) -> list[int]:
        return [token async for delta in engine.generate(request) for token in delta.ids]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(request)) for request in wanted]
    return [task.result() for task in tasks]


def penalised(row: NDArray[np.float32], seen: tuple[int, ...], penalty: float) -> NDArray[np.float32]:
    """A row of logits after the repetition penalty of `gpa_engines.sampling`: each id of `seen` once."""
    ids = np.unique(np.asarray(seen, np.int64))
    scores = row.copy()
    scores[ids] = np.where(row[ids] < 0, row[ids] * np.float32(penalty), row[ids] / np.float32(penalty))
    return scores


def clip_arrays(codec: SpeechCodec, file: Path) -> tuple[ClipCodes, dict[str, Any]]:
    """A clip's codes, and the arrays of its file in a baseline (see `gpa_conformance.baseline.reading`)."""
    clip = load_audio(file)
    tokens, voice = codec.encode(clip), codec.voice(clip)
    level = float(np.sqrt(np.mean(np.square(clip.pcm))))
    random = np.random.default_rng(0)
    stable = {name: np.ones(count, bool) for name, count in _counts(tokens.semantic, tokens.glm, voice.codes)}
    for _ in range(REPEATS):
        noisy = Waveform(clip.pcm + random.normal(0, NOISE * level, len(clip.pcm)), clip.sample_rate)
        again, voice_again = codec.encode(noisy), codec.voice(noisy)
        stable["semantic"] &= again.semantic == tokens.semantic
        stable["glm"] &= again.glm == tokens.glm
        stable["voice"] &= np.asarray(voice_again.codes) == np.asarray(voice.codes)
    arrays = {
        "semantic": tokens.semantic,
        "glm": tokens.glm,
        "voice": np.asarray(voice.codes, np.int64),
        "duration": np.float64(tokens.duration),
        "pcm": np.asarray(codec.decode(tokens.semantic, voice).pcm, np.float32),
    }
    return ClipCodes(tokens, voice), arrays | {f"{name}_stable": mask for name, mask in stable.items()}


def top_arrays(rows: TopRows) -> dict[str, NDArray]:
    """The arrays of a top.npz."""

    def top(prefix: str, part: Top) -> dict[str, NDArray]:
        return {
            f"{prefix}_ids": part.ids.astype(np.int32),
            f"{prefix}_logits": part.logits,
            f"{prefix}_log_normaliser": part.log_normaliser,
            f"{prefix}_count": np.asarray(part.count, np.int64),
            f"{prefix}_sample_ids": part.sample_ids.astype(np.int32),
            f"{prefix}_sample": part.sample,
        }

    common = {name: getattr(rows, name) for name in ("positions", "mean", "norm")}
    allowed = {} if rows.allowed is None else top("allowed", rows.allowed)
    return common | top("top", rows.top) | allowed


def _counts(semantic: NDArray, glm: NDArray, voice: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    return ("semantic", len(semantic)), ("glm", len(glm)), ("voice", len(voice))
