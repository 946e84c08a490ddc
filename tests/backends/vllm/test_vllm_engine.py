"""The real vLLM, in float32 on the tiny checkpoint, against the torch engine."""

# vllm has an environment of its own, which is not that of the type checker.
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import CapacityError, RequestError
from gpa_engines.backends.vllm.engine import VllmEngine
from gpa_engines.engine import Engine, GenerationRequest, GivesRows, SamplingParams, TokenDelta
from tests.backends.vllm.asking import (
    IM_END,
    PROMPT,
    answer,
    answers,
    mixed_requests,
    prompt_of,
    request,
    speech_request,
)
from tests.backends.vllm.conftest import MAX_CONTEXT

SAMPLING: dict[str, dict[str, Any]] = {
    "as speech": {"temperature": 0.2, "top_k": 50, "repetition_penalty": 1.2},
    "plain": {"temperature": 1.0},
    "hotter than vLLM allows": {"temperature": 4.0},
    "colder than vLLM allows": {"temperature": 0.0001},
    "top-p": {"temperature": 0.8, "top_p": 0.8},
    "min-p behind top-p": {"temperature": 1.5, "top_p": 0.7, "min_p": 0.3},
    "everything": {
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "min_new_tokens": 5,
    },
}


def unfinished(engine: Engine) -> int:
    """Requests that vLLM still has."""
    assert isinstance(engine, VllmEngine)
    client = engine._llm.client
    assert client is not None
    return client.output_processor.get_num_unfinished_requests()


async def settle(engine: Engine) -> None:
    """Wait until vLLM has no requests."""
    deadline = time.monotonic() + 10
    while unfinished(engine):
        assert time.monotonic() < deadline, "vLLM still has requests"
        await asyncio.sleep(0.01)


async def collect(engine: Engine, wanted: Sequence[GenerationRequest]) -> list[tuple[int, ...]]:
    return [each.ids for each in await answers(engine, wanted)]


def test_the_engine_says_what_it_is(engine: Engine) -> None:
    info = engine.info
    assert (info.backend, info.dtype, info.vocab_size, info.max_context) == ("vllm", "float32", 5141, MAX_CONTEXT)
    assert info.capabilities == {"logits", "batch", "allowed", "seed", "chunked_prefill"}
    assert info.note.startswith("vllm")
    assert isinstance(engine, Engine)
    assert isinstance(engine, GivesRows)


def test_logits_are_the_torch_engines(engine: Engine, torch_engine: Engine) -> None:
    async def compare() -> None:
        for length in (1, 2, 60, 700):
            ids = prompt_of(length, length)
            ours, theirs = await engine.logits(ids), await torch_engine.logits(ids)
            assert (ours.shape, ours.dtype) == (theirs.shape, np.float32)
            apart = np.linalg.norm(ours.astype(np.float64) - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
            assert apart.max() < 1e-5

    asyncio.run(compare())


def test_rows_are_those_of_the_whole_by_either_way(engine: Engine) -> None:
    ids = prompt_of(60, 1)

    async def compare() -> None:
        assert isinstance(engine, GivesRows)
        whole = await engine.logits(ids)
        for positions in ([59], [0, 31], range(0, 60, 2), []):
            rows = await engine.logits_at(ids, positions)
            np.testing.assert_allclose(rows, whole[list(positions)], atol=2e-5)

    asyncio.run(compare())


def test_greedy_answers_are_the_torch_engines(engine: Engine, torch_engine: Engine) -> None:
    wanted = [
        request(),
        request(repetition_penalty=1.4),
        request(min_new_tokens=6),
        speech_request(PROMPT),
        speech_request(prompt_of(300, 2), repetition_penalty=1.2),
    ]

    async def both() -> None:
        assert await collect(engine, wanted) == await collect(torch_engine, wanted)

    asyncio.run(both())


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_a_seed_gives_the_torch_engines_tokens(engine: Engine, torch_engine: Engine, sampling: dict[str, Any]) -> None:
    """The one sampling rule to the token: filters, penalty, ties and random numbers."""
    wanted = [request(seed=seed, **sampling) for seed in range(4)]
    wanted += [speech_request(prompt_of(80, seed), seed=2**62 + seed, **sampling) for seed in range(4)]

    async def both() -> None:
        ours = await collect(engine, wanted)
        assert ours == await collect(torch_engine, wanted)
        assert len(set(ours)) > 2

    asyncio.run(both())


def test_ties_go_to_the_lowest_id_and_stay_at_the_limit_of_top_k(
    engine: Engine, torch_engine: Engine, twins: tuple[int, int, int]
) -> None:
    """Three ids have the same embedding, and with it the same logit: the best one behind the prompt."""

    async def ask() -> None:
        assert isinstance(engine, GivesRows)
        (row,) = await engine.logits_at(PROMPT, [len(PROMPT) - 1])
        assert row[list(twins)].tolist() == [row.max()] * 3
        assert (await answer(engine, request(max_new_tokens=1))).ids == (min(twins),)
        wanted = [request(max_new_tokens=1, temperature=1.0, top_k=1, seed=seed) for seed in range(40)]
        drawn = await collect(engine, wanted)
        assert {ids[0] for ids in drawn} == set(twins)
        assert drawn == await collect(torch_engine, wanted)

    asyncio.run(ask())


def test_32_concurrent_requests_are_as_alone(engine: Engine) -> None:
    wanted = mixed_requests(32)

    async def compare() -> None:
        alone = [(await answer(engine, each)).ids for each in wanted]
        assert await collect(engine, wanted) == alone

    asyncio.run(compare())


def test_seeded_prompts_that_are_read_in_parts(engine: Engine, torch_engine: Engine) -> None:
    """vLLM's own seeds end the engine here: "CPU Generator does not use offset"."""
    wanted = [request(prompt_of(700, seed), 6, temperature=0.9, seed=seed) for seed in range(4)]

    async def both() -> None:
        assert await collect(engine, wanted) == await collect(torch_engine, wanted)

    asyncio.run(both())


def test_requests_that_lose_their_place_in_the_cache_go_on_where_they_were(
    engine: Engine, torch_engine: Engine
) -> None:
    """There is room for two longest requests; vLLM computes the others anew so far, random numbers included."""
    sampling = {"temperature": 0.9, "top_k": 40, "repetition_penalty": 1.1, "min_new_tokens": 350}
    wanted = [request(prompt_of(100, seed), 400, seed=seed, **sampling) for seed in range(12)]

    async def both() -> None:
        before = preemptions()
        assert await collect(engine, wanted) == await collect(torch_engine, wanted)
        assert preemptions() > before

    asyncio.run(both())


def preemptions() -> float:
    """How often vLLM has taken a request's place in the cache away, by its own count."""
    from prometheus_client import REGISTRY

    return sum(
        sample.value
        for metric in REGISTRY.collect()
        if metric.name == "vllm:num_preemptions"
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


def test_the_stop_id_ends_the_answer_and_is_no_part_of_it(engine: Engine) -> None:
    async def stop() -> None:
        free = (await answer(engine, request())).ids
        for index in (0, 1, 5):
            sampling = SamplingParams(max_new_tokens=12)
            stopped = await answer(engine, GenerationRequest(PROMPT, sampling, (free[index], 3)))
            assert stopped.ids == free[: free.index(free[index])]
            assert stopped.finish_reason == "stop"
            assert stopped.usage.new_tokens == len(stopped.ids)

    asyncio.run(stop())


def test_the_checkpoints_own_end_token_is_a_token_like_others(engine: Engine) -> None:
    """vLLM adds the one of generation_config.json to stop ids and to what min_tokens bars."""
    only_end = (range(IM_END, IM_END + 1),)
    sampling = SamplingParams(max_new_tokens=5, min_new_tokens=3)

    async def ask() -> None:
        given = await answer(engine, GenerationRequest(PROMPT, sampling, (9,), only_end))
        assert given.ids[:3] == (IM_END,) * 3
        free = await answer(engine, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=4), (), only_end))
        assert (free.ids, free.finish_reason) == ((IM_END,) * 4, "length")

    asyncio.run(ask())


def test_usage_tells_counts_seed_and_times(engine: Engine) -> None:
    async def ask() -> None:
        given = await answer(engine, request(max_new_tokens=9, temperature=1.0, seed=77))
        usage = given.usage
        assert (usage.prompt_tokens, usage.new_tokens, usage.seed) == (len(PROMPT), 9, 77)
        assert given.finish_reason == "length"
        for seconds in (usage.queue, usage.prefill, usage.decode):
            assert math.isfinite(seconds)
            assert seconds >= 0
        assert usage.prefill > 0
        assert usage.decode > 0
        fresh = [await answer(engine, request(temperature=1.0)) for _ in range(2)]
        assert fresh[0].usage.seed != fresh[1].usage.seed
        again = await answer(engine, request(temperature=1.0, seed=fresh[0].usage.seed))
        assert again.ids == fresh[0].ids

    asyncio.run(ask())


def test_tokens_come_as_they_are_made(engine: Engine) -> None:
    assert asyncio.run(answer(engine, request(max_new_tokens=40))).deltas > 5


def test_one_engine_serves_loops_one_after_the_other(engine: Engine) -> None:
    first, *others = [asyncio.run(answer(engine, request())).ids for _ in range(3)]
    assert others == [first, first]


def test_every_way_to_stop_frees_the_request(engine: Engine) -> None:
    endless = request(max_new_tokens=1500)

    async def first_delta(stream: Any) -> TokenDelta:
        async for delta in stream:
            return delta
        raise AssertionError("no delta")

    async def by_closing() -> None:
        async with aclosing(engine.generate(endless)) as stream:
            await first_delta(stream)

    async def by_cancelling_the_task() -> None:
        task = asyncio.create_task(answer(engine, endless))
        while not unfinished(engine):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def by_cancelling_at_once() -> None:
        task = asyncio.create_task(answer(engine, endless))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def by_forgetting() -> None:
        stream = engine.generate(endless)
        await first_delta(stream)
        del stream
        gc.collect()

    async def by_cancelling_logits() -> None:
        task = asyncio.create_task(engine.logits(prompt_of(2000, 1)))
        while not unfinished(engine):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def all_ways() -> None:
        before = (await answer(engine, request())).ids
        for stop in (by_closing, by_cancelling_the_task, by_cancelling_at_once, by_forgetting, by_cancelling_logits):
            await asyncio.gather(*(stop() for _ in range(3)))
            await settle(engine)
        assert (await answer(engine, request())).ids == before

    asyncio.run(all_ways())

    async def by_leaving_the_loop() -> None:
        await first_delta(engine.generate(endless))

    asyncio.run(by_leaving_the_loop())
    asyncio.run(settle(engine))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (request((1, 5141)), RequestError, r"prompt_ids\[1\] is 5141; the vocabulary has ids 0 to 5140"),
        (request((-1,)), RequestError, r"prompt_ids\[0\] is -1"),
        (GenerationRequest((1,), SamplingParams(), (5141,)), RequestError, r"stop_ids\[0\] is 5141"),
        (GenerationRequest((1,), SamplingParams(), (), (range(5000, 5142),)), RequestError, "allowed ends at id 5141"),
        (
            request(PROMPT, MAX_CONTEXT),
            CapacityError,
            f"need {MAX_CONTEXT + 40} positions; the model has {MAX_CONTEXT}",
        ),
        (request([1] * MAX_CONTEXT, 1), CapacityError, "shorten the prompt"),
        (
            GenerationRequest((1,), SamplingParams(min_new_tokens=1), (5,), ()),
            RequestError,
            "the only ids that the answer may hold are stop ids",
        ),
    ],
)
def test_bad_requests_are_refused_and_the_others_go_on(
    engine: Engine, bad: GenerationRequest, error: type[Exception], message: str
) -> None:
    async def ask() -> None:
        good = asyncio.create_task(answer(engine, request()))
        with pytest.raises(error, match=message):
            await answer(engine, bad)
        assert len((await good).ids) == 12

    asyncio.run(ask())


def test_bad_positions_and_ids_of_logits_are_refused(engine: Engine) -> None:
    async def ask() -> None:
        assert isinstance(engine, GivesRows)
        for ids, positions, message in (
            ((), (), "ids is empty"),
            ((1, 5141), (0,), r"ids\[1\] is 5141"),
            ((1, 2), (2,), "outside the 2 ids"),
            ((1, 2), (1, 0), "strictly ascending"),
            ((1,) * (MAX_CONTEXT + 1), (0,), f"the model has {MAX_CONTEXT} positions"),
        ):
            with pytest.raises(RequestError, match=message):
                await engine.logits_at(ids, positions)
        assert (await engine.logits_at([1] * MAX_CONTEXT, [MAX_CONTEXT - 1])).shape == (1, 5141)

    asyncio.run(ask())


def test_a_whole_context_of_prompt_and_answer(engine: Engine) -> None:
    given = asyncio.run(answer(engine, request(prompt_of(MAX_CONTEXT - 20, 3), 20)))
    assert (len(given.ids), given.finish_reason) == (20, "length")
