"""Requests join, leave, wait, fail and are cancelled without touching one another."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from gpa_codecs.errors import CapacityError, CheckpointError, RequestError
from gpa_engines.engine import TokenDelta
from gpa_engines.step_engine import StepEngine
from gpa_engines.step_model import Slot, SlotRequest, StepRow
from tests.engines.generating import Answer, WatchedModel, answer, answers, load_model, mixed_requests, request


@pytest.fixture
def watched(tiny_checkpoint: Path) -> WatchedModel:
    return WatchedModel(load_model(tiny_checkpoint))


@pytest.fixture
def prompts(goldens: dict[str, Any]) -> list[list[int]]:
    return [prompt["input_ids"] for prompt in goldens["prompts"]]


def run_alone(watched: WatchedModel, requests: Sequence[Any]) -> list[Answer]:
    """Each request on an idle engine, one after the other."""

    async def main() -> list[Answer]:
        engine = watched.engine()
        alone = [await answer(engine, each) for each in requests]
        await engine.close()
        return alone

    alone = asyncio.run(main())
    watched.steps.clear()
    return alone


def ids_of(results: Sequence[Answer]) -> list[tuple[int, ...]]:
    return [each.ids for each in results]


def test_a_long_prompt_does_not_stall_a_running_request(watched: WatchedModel, prompts: list[list[int]]) -> None:
    async def main() -> None:
        engine = watched.engine(prefill_chunk=64)
        running = engine.generate(request(prompts[2], 300))
        await anext(running)
        await answer(engine, request(prompts[1], 1))
        await running.aclose()
        await engine.close()

    asyncio.run(main())
    chunked = [rows for rows in watched.steps if any(row.start > 0 and len(row.ids) > 1 for row in rows)]
    assert len(prompts[1]) // 64 <= len(chunked)
    # The 397-token prompt is slot 1; beside every chunk of it slot 0 makes a token.
    assert all({row.slot: len(row.ids) for row in rows}.get(0) == 1 for rows in watched.steps if rows[-1].slot == 1)


def test_prompts_share_one_chunk_of_tokens_per_step_and_keep_their_own_cuts(
    watched: WatchedModel, prompts: list[list[int]]
) -> None:
    async def main() -> None:
        engine = watched.engine(prefill_chunk=128)
        await answers(engine, [request(prompts[index], 2) for index in (2, 0, 1)])
        await engine.close()

    asyncio.run(main())
    fed = [sum(len(row.ids) for row in rows if len(row.ids) > 1) for rows in watched.steps]
    assert max(fed) <= 128
    starts = {row.start for rows in watched.steps for row in rows if len(row.ids) > 1}
    assert all(start % 128 == 0 for start in starts)


def test_a_prompt_is_cut_where_it_would_be_if_nothing_of_it_were_held(
    watched: WatchedModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = watched.model.allocate

    def holding(wanted: SlotRequest) -> Slot | None:
        slot = allocate(wanted)
        assert slot is not None
        watched.model.step([StepRow(slot.number, list(wanted.prompt[:50]), 0, "none")])
        return Slot(slot.number, 50)

    wanted = request(prompts[1], 4)
    (alone,) = run_alone(watched, [wanted])
    monkeypatch.setattr(watched.model, "allocate", holding)

    async def main() -> Answer:
        engine = watched.engine(prefill_chunk=64)
        kept = await answer(engine, wanted)
        await engine.close()
        return kept

    assert asyncio.run(main()).ids == alone.ids
    starts = [row.start for rows in watched.steps for row in rows if len(row.ids) > 1]
    assert starts == [50, *range(64, len(prompts[1]), 64)]


def test_more_requests_than_slots_wait_in_order(tiny_checkpoint: Path, goldens: dict[str, Any]) -> None:
    watched = WatchedModel(load_model(tiny_checkpoint, max_batch=3))
    requests = mixed_requests(goldens["prompts"], 32)
    alone = run_alone(watched, requests)

    async def main() -> list[Answer]:
        engine = watched.engine()
        results = await answers(engine, requests)
        await engine.close()
        return results

    together = asyncio.run(main())
    assert ids_of(together) == ids_of(alone)
    assert max(len(rows) for rows in watched.steps) == 3
    first_seen = list(dict.fromkeys(row.slot for rows in watched.steps for row in rows))
    assert first_seen == sorted(first_seen)
    assert watched.held == set()


def test_requests_wait_for_room_in_the_cache(tiny_checkpoint: Path, prompts: list[list[int]]) -> None:
    watched = WatchedModel(load_model(tiny_checkpoint, max_tokens=250))

    async def main() -> list[Answer]:
        engine = watched.engine()
        results = await answers(engine, [request(prompts[2], 40) for _ in range(5)])
        await engine.close()
        return results

    results = asyncio.run(main())
    assert len(set(ids_of(results))) == 1
    assert max(len(rows) for rows in watched.steps) == 2


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(tiny_checkpoint: Path) -> None:
    watched = WatchedModel(load_model(tiny_checkpoint, max_tokens=50))

    async def main() -> None:
        engine = watched.engine()
        with pytest.raises(CapacityError, match="needs 51 positions; max_tokens_in_flight is 50"):
            await answer(engine, request([1] * 31, 20))
        with pytest.raises(CapacityError, match="needs 51 positions; max_tokens_in_flight is 50: give fewer ids"):
            await engine.logits([1] * 51)
        with pytest.raises(CapacityError, match="the model has 32768"):
            await answer(engine, request([1], 32768))
        assert (await answer(engine, request([1] * 30, 20))).usage.new_tokens == 20
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("way", ["aclose", "task", "scope"])
def test_a_cancelled_request_frees_its_slot_and_leaves_the_others_unchanged(
    watched: WatchedModel, goldens: dict[str, Any], way: str
) -> None:
    requests = mixed_requests(goldens["prompts"], 6)
    alone = run_alone(watched, requests)
    first_delta = asyncio.Event()

    async def cancelled(engine: StepEngine) -> None:
        async with aclosing(engine.generate(request(goldens["prompts"][3]["input_ids"], 2000))) as deltas:
            async for _ in deltas:
                first_delta.set()
                if way == "aclose":
                    return

    async def main() -> list[Answer]:
        engine = watched.engine()
        others = asyncio.create_task(answers(engine, requests))
        if way == "scope":
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(cancelled, engine)
                    await first_delta.wait()
                    scope.cancel()
        else:
            task = asyncio.create_task(cancelled(engine))
            await first_delta.wait()
            if way == "task":
                task.cancel()
            await asyncio.wait([task])
        results = await others
        assert await engine.call(lambda: set(watched.held)) == set()
        await engine.close()
        return results

    assert ids_of(asyncio.run(main())) == ids_of(alone)


def test_a_waiting_request_can_be_cancelled(tiny_checkpoint: Path, prompts: list[list[int]]) -> None:
    watched = WatchedModel(load_model(tiny_checkpoint, max_batch=1))

    async def main() -> None:
        engine = watched.engine()
        running = engine.generate(request(prompts[2], 500))
        await anext(running)
        waiting = asyncio.create_task(answer(engine, request(prompts[3], 5)))
        await asyncio.sleep(0)
        await engine.call(lambda: None)
        waiting.cancel()
        await asyncio.wait([waiting])
        await running.aclose()
        assert await engine.call(lambda: set(watched.held)) == set()
        await engine.close()

    asyncio.run(main())
    assert {row.slot for rows in watched.steps for row in rows} == {0}


def test_a_failing_step_fails_its_requests_and_leaves_the_engine_usable(
    watched: WatchedModel, prompts: list[list[int]]
) -> None:
    def fail_third(number: int, rows: Sequence[StepRow]) -> None:
        if number == 3:
            watched.steps.append([])
            raise ValueError("out of memory, say")

    watched.before_step = fail_third

    async def main() -> None:
        engine = watched.engine()
        results = await asyncio.gather(
            *(answer(engine, request(prompts[index], 20)) for index in (2, 3)), return_exceptions=True
        )
        for result in results:
            assert isinstance(result, RequestError)
            assert "out of memory, say" in str(result)
            assert isinstance(result.__cause__, ValueError)
        assert watched.held == set()
        assert len((await answer(engine, request(prompts[2], 20))).ids) == 20
        await engine.close()

    asyncio.run(main())


def test_a_request_that_the_model_refuses_fails_alone(watched: WatchedModel, prompts: list[list[int]]) -> None:
    (expected,) = run_alone(watched, [request(prompts[2], 6)])
    allocate = watched.allocate

    def refuse(wanted: SlotRequest) -> Slot | None:
        if len(wanted.prompt) == 5:
            raise RequestError("five is too few")
        return allocate(wanted)

    watched.allocate = refuse  # type: ignore[method-assign]

    async def main() -> None:
        engine = watched.engine()
        fine = asyncio.create_task(answer(engine, request(prompts[2], 6)))
        for _ in range(2):
            with pytest.raises(RequestError, match="five is too few"):
                await answer(engine, request(prompts[1][:5], 6))
        assert (await fine).ids == expected.ids
        assert not watched.held
        await engine.close()

    asyncio.run(main())


def test_closing_interrupts_a_model_that_is_still_there(watched: WatchedModel) -> None:
    """The thread may read the order to stop before the one who gave it goes on to interrupt the step."""

    class Interrupted(WatchedModel):
        interruptions = 0

        def interrupt(self) -> None:
            self.interruptions += 1

    class SlowInbox:
        def __init__(self, inbox: Any) -> None:
            self.get, self.empty, self._put = inbox.get, inbox.empty, inbox.put

        def put(self, action: Any) -> None:
            self._put(action)
            time.sleep(0.1)

    model = Interrupted(watched.model)

    async def main() -> None:
        engine = model.engine()
        scheduler = engine._scheduler
        scheduler.inbox = SlowInbox(scheduler.inbox)  # type: ignore[assignment]
        await engine.close()

    asyncio.run(main())
    assert model.interruptions == 1


def test_logits_that_are_not_numbers_fail_only_their_request(watched: WatchedModel, prompts: list[list[int]]) -> None:
    def poison(rows: Sequence[StepRow], results: list[Any]) -> None:
        for index, row in enumerate(rows):
            # Only the prompt of 88 tokens gets there; the one of 76 ends at 86.
            if row.start > 90:
                results[index] = np.full_like(results[index], np.nan)

    requests = [request(prompts[2], 10), request(prompts[3], 20)]
    expected = run_alone(watched, requests[:1])
    watched.after_step = poison

    async def main() -> None:
        engine = watched.engine()
        good, bad = await asyncio.gather(*(answer(engine, each) for each in requests), return_exceptions=True)
        assert isinstance(good, Answer)
        assert good.ids == expected[0].ids
        assert isinstance(bad, RequestError)
        await engine.close()

    asyncio.run(main())


def test_an_engine_whose_thread_died_says_so(watched: WatchedModel, prompts: list[list[int]]) -> None:
    def lose_slots(slot: int) -> None:
        raise KeyError("slot lost")

    watched.release = lose_slots

    async def main() -> None:
        engine = watched.engine()
        running = asyncio.create_task(answer(engine, request(prompts[3], 200)))
        assert len((await answer(engine, request(prompts[2], 3))).ids) == 3
        with pytest.raises(RequestError, match=r"thread died of KeyError.*slot lost"):
            await running
        with pytest.raises(RequestError, match=r"thread died .*create a new engine"):
            await answer(engine, request(prompts[2], 3))
        await engine.close()

    asyncio.run(main())


def test_closing_ends_what_runs_and_what_waits(tiny_checkpoint: Path, prompts: list[list[int]]) -> None:
    watched = WatchedModel(load_model(tiny_checkpoint, max_batch=1))

    async def main() -> None:
        engine = watched.engine()
        running = engine.generate(request(prompts[2], 1000))
        await anext(running)
        waiting = asyncio.create_task(answer(engine, request(prompts[3], 5)))
        rows = asyncio.create_task(engine.logits(prompts[2]))
        await asyncio.sleep(0)
        await engine.close()
        await engine.close()
        last = [delta async for delta in running][-1]
        assert last.finish_reason == "cancelled"
        assert last.usage is not None
        assert last.usage.new_tokens > 0
        assert await waiting == Answer((), "cancelled", (await waiting).usage)
        with pytest.raises(RequestError, match="closed"):
            await rows
        for refused in (answer(engine, request([1])), engine.logits([1]), engine.call(lambda: None)):
            with pytest.raises(RequestError, match="the engine is closed; create a new one"):
                await refused

    asyncio.run(main())
    assert watched.thread is not None
    assert not watched.thread.is_alive()


def test_several_event_loops_use_one_engine(watched: WatchedModel, goldens: dict[str, Any]) -> None:
    requests = mixed_requests(goldens["prompts"], 8)
    alone = run_alone(watched, requests)
    engine = watched.engine()
    results: list[list[Answer]] = [[], [], []]

    def use(place: int) -> None:
        results[place] = asyncio.run(answers(engine, requests))

    threads = [threading.Thread(target=use, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(engine.close())
    assert all(ids_of(each) == ids_of(alone) for each in results)


def test_a_request_whose_event_loop_is_gone_is_dropped(watched: WatchedModel, prompts: list[list[int]]) -> None:
    engine = watched.engine()
    loop = asyncio.new_event_loop()
    abandoned = engine.generate(request(prompts[2], 5000))
    loop.run_until_complete(anext(abandoned))
    loop.close()

    async def main() -> None:
        # The engine notices when it hands over the next token, so at the latest while this answer is made.
        await answer(engine, request(prompts[3], 5))
        assert watched.held == set()
        await engine.close()

    asyncio.run(main())


def test_deltas_end_with_reason_and_usage(watched: WatchedModel, prompts: list[list[int]]) -> None:
    async def main() -> list[TokenDelta]:
        engine = watched.engine()
        deltas = [delta async for delta in engine.generate(request(prompts[2], 4, temperature=1.0))]
        await engine.close()
        return deltas

    deltas = asyncio.run(main())
    assert [len(delta.ids) for delta in deltas] == [1, 1, 1, 1]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "length"]
    usage = deltas[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.new_tokens) == (len(prompts[2]), 4)
    assert min(usage.queue, usage.prefill, usage.decode) > 0


def test_call_runs_between_steps_and_hands_back_what_it_raises(watched: WatchedModel) -> None:
    async def main() -> None:
        engine = watched.engine()
        assert await engine.call(threading.current_thread) is not threading.current_thread()
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda: 1 // 0)
        assert len((await answer(engine, request([1, 2, 3], 2))).ids) == 2
        await engine.close()

    asyncio.run(main())


def test_what_runs_first_is_done_when_the_engine_is_made(watched: WatchedModel) -> None:
    ran_on: list[threading.Thread] = []
    engine = watched.engine(on_start=lambda: ran_on.append(threading.current_thread()))
    assert len(ran_on) == 1
    asyncio.run(engine.logits([1, 2]))
    assert ran_on == [watched.thread]
    asyncio.run(engine.close())


def test_what_runs_first_and_fails_leaves_no_engine_and_no_thread(watched: WatchedModel) -> None:
    ran_on: list[threading.Thread] = []

    def fail() -> None:
        ran_on.append(threading.current_thread())
        raise CheckpointError("the weights are damaged")

    with pytest.raises(CheckpointError, match="the weights are damaged"):
        watched.engine(on_start=fail)
    assert not ran_on[0].is_alive()


def test_an_idle_engine_uses_no_processor_time(watched: WatchedModel) -> None:
    async def main() -> float:
        engine = watched.engine()
        await answer(engine, request([1, 2, 3], 2))
        before = await engine.call(time.thread_time)
        await asyncio.sleep(0.3)
        used = await engine.call(time.thread_time) - before
        await engine.close()
        return used

    assert asyncio.run(main()) < 0.03


def test_an_engine_nobody_holds_ends_its_thread(watched: WatchedModel) -> None:
    engine = watched.engine()
    asyncio.run(answer(engine, request([1, 2, 3], 2)))
    thread = watched.thread
    assert thread is not None
    del engine
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_the_interpreter_exits_while_a_request_runs(tiny_checkpoint: Path) -> None:
    script = f"""
import asyncio
from gpa_engines.backends.torch import create_engine
from gpa_engines.engine import GenerationRequest, SamplingParams
engine = create_engine({str(tiny_checkpoint)!r})
loop = asyncio.new_event_loop()
deltas = engine.generate(GenerationRequest((1, 2, 3), SamplingParams(max_new_tokens=8000)))
print(len(loop.run_until_complete(anext(deltas)).ids))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (process.returncode, process.stdout.strip()) == (0, "1"), process.stderr
