"""What the tests over real servers share: the torch engine's answers, and streams in the middle of which one dies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import RequestError
from gpa_engines.cli.run import main as gpa_run
from gpa_engines.engine import Engine, GenerationRequest
from tests.servers.asking import Answer, answer


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


async def start_streams(
    engine: Engine, requests: Sequence[GenerationRequest], expected: Sequence[Answer], *, each_gave: int = 0
) -> list[asyncio.Task[Answer]]:
    """Watched streams of all requests, once they have given five tokens each on average, and `each_gave` each."""
    counts = [0] * len(requests)
    running = [
        asyncio.create_task(watch(engine, wanted, whole, counts, index))
        for index, (wanted, whole) in enumerate(zip(requests, expected, strict=True))
    ]
    while sum(counts) < 5 * len(counts) or min(counts) < each_gave:
        await asyncio.sleep(0.02)
    return running


async def check_greedy(remote: Engine, local: Engine, requests: Sequence[GenerationRequest]) -> None:
    """Alone and in company, ids and ends are those of the local engine; both kinds of ends occur."""
    expected = [await answer(local, each) for each in requests]
    alone = [await answer(remote, each) for each in requests]
    together = await asyncio.gather(*(answer(remote, each) for each in requests))
    for given in (alone, together):
        assert [each.ids for each in given] == [each.ids for each in expected]
        assert [each.finish_reason for each in given] == [each.finish_reason for each in expected]
    assert {each.finish_reason for each in expected} == {"stop", "length"}


async def check_logits(remote: Engine, local: Engine, count: int = 3) -> None:
    """Of `count` prompts, within 1e-5."""
    for prompt in prompts(count):
        mine, theirs = await remote.logits(prompt), await local.logits(prompt)
        assert np.linalg.norm(mine - theirs) / np.linalg.norm(theirs) < 1e-5


def check_speech_task(
    task: Sequence[str],
    url: str,
    model: Path,
    audio_dir: Path,
    out_dir: Path,
    capture: pytest.CaptureFixture[bytes],
    *,
    unlink: Path | None = None,
) -> None:
    """Real audio through gpa-run: the same text, or the same samples, as greedy torch gives in float32.

    unlink: file that is gone when the server is asked.
    """
    arguments = [str(audio_dir / each) if (audio_dir / each).is_file() else each for each in task]
    common = [*arguments, "--model", str(model), "--dtype", "float32", "--temperature", "0"]
    results = []
    for more in (["--backend", "torch"], ["--backend", "remote", "--url", url]):
        out = out_dir / f"{more[1]}.out"
        capture.readouterr()
        assert gpa_run([*common, *more, "--max-new-tokens", "100", "--json", "-o", str(out)]) == 0
        report = json.loads(capture.readouterr().out)
        assert report["backend"] == more[1]
        results.append((out.read_bytes(), report["new_tokens"], [piece["finish_reason"] for piece in report["pieces"]]))
        if unlink is not None:
            unlink.unlink(missing_ok=True)
    assert results[0] == results[1]
    assert results[0][1] > 20
