"""Several engines behind one: requests are spread, answers stay the same, and one engine's failure is its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, CapacityError, DeclinedRequest, RequestError
from gpa_engines.engine import Engine, EngineInfo, GenerationRequest, GivesRows, TokenDelta
from gpa_engines.memory import MemoryMeter, MemoryReport, MemoryUse, SummedMemory
from gpa_engines.registry import create_engine
from gpa_engines.spread_engine import SpreadEngine

pytest.importorskip("torch", reason="needs torch")

from tests.engines.generating import answer, answers, mixed_requests, request


class Guarded:
    """An engine over another one, which counts what it serves and fails while `failure` is set."""

    def __init__(self, engine: Engine, **info: Any) -> None:
        self.engine = engine
        self.info: EngineInfo = replace(engine.info, **info)
        self.memory_meter: MemoryMeter | None = None
        self.served = 0
        self.failure: Exception | None = None
        self.stall: asyncio.Event | None = None
        self.closed = 0
        self.close_failure: Exception | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        self.served += 1
        if self.stall is not None:
            await self.stall.wait()
        async with aclosing(self.engine.generate(request)) as deltas:
            async for delta in deltas:
                if self.failure is not None:
                    raise self.failure
                yield delta

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self.served += 1
        return await self.engine.logits(ids)

    async def close(self) -> None:
        self.closed += 1
        await self.engine.close()
        if self.close_failure is not None:
            raise self.close_failure


@pytest.fixture
def load(tiny_checkpoint: Path) -> Callable[..., Guarded]:
    def create(**info: Any) -> Guarded:
        engine = create_engine("torch", tiny_checkpoint, device="cpu", threads=1, max_tokens_in_flight=1024)
        return Guarded(engine, **info)

    return create


def test_it_is_an_engine_and_says_what_all_of_it_has(load: Callable[..., Guarded]) -> None:
    first = load(device="npu:0", note="chip", max_context=4096)
    second = load(device="npu:1", note="chip", capabilities=frozenset(("logits", "batch")))
    engine = SpreadEngine([first, second])
    assert isinstance(engine, Engine)
    assert isinstance(engine, GivesRows)
    assert isinstance(engine, MemoryReport)
    info = engine.info
    assert (info.backend, info.device, info.max_context) == ("torch", "npu:0,npu:1", 4096)
    assert info.capabilities == {"logits", "batch"}
    assert info.note == "chip; requests are spread over 2 engines"
    asyncio.run(engine.close())
    assert (first.closed, second.closed) == (1, 1)


def test_requests_go_where_fewest_are_open_and_get_the_same_answers(
    load: Callable[..., Guarded], goldens: dict[str, Any]
) -> None:
    members = [load(), load()]
    engine = SpreadEngine(members)
    requests = mixed_requests(goldens["prompts"], 8)

    async def main() -> None:
        expected = [(await answer(members[0].engine, each)).ids for each in requests]
        assert [each.ids for each in await answers(engine, requests)] == expected
        assert [member.served for member in members] == [4, 4]
        # One long answer keeps the first busy: the short ones go to the second, one after the other.
        long = engine.generate(request((1, 2, 3), 200))
        await anext(long)
        for _ in range(3):
            await answer(engine, request((1, 2, 3), 2))
        assert [member.served for member in members] == [5, 7]
        await long.aclose()
        await answer(engine, request((1, 2, 3), 2))
        assert [member.served for member in members] == [6, 7]
        await engine.close()

    asyncio.run(main())


def test_logits_come_from_any_engine_with_and_without_rows(load: Callable[..., Guarded]) -> None:
    guarded = load()
    engine = SpreadEngine([guarded.engine, guarded])

    async def main() -> None:
        whole = await guarded.engine.logits((1, 2, 3, 4))
        np.testing.assert_array_equal(await engine.logits((1, 2, 3, 4)), whole)
        held = engine.generate(request((1, 2, 3), 200))
        await anext(held)
        assert not isinstance(guarded, GivesRows)
        np.testing.assert_array_equal(await engine.logits_at((1, 2, 3, 4), (1, 3)), whole[[1, 3]])
        assert guarded.served == 1
        await held.aclose()
        np.testing.assert_array_equal(await engine.logits_at((1, 2, 3, 4), (0,)), whole[[0]])
        assert guarded.served == 1
        await engine.close()

    asyncio.run(main())


def test_a_refused_request_is_no_failure_of_the_engine(load: Callable[..., Guarded]) -> None:
    members = [load(), load()]
    engine = SpreadEngine(members)

    async def main() -> None:
        with pytest.raises(RequestError, match=r"^prompt_ids\[1\] is 9999"):
            await answer(engine, request((1, 9999), 2))
        with pytest.raises(CapacityError, match=r"^the request needs 1101 positions; max_tokens_in_flight is 1024"):
            await answer(engine, request((1,), 1100))
        for ids, message in (((), "ids is empty"), ((-1,), r"ids\[0\] is -1"), ((1,) * 40000, "40000 ids; the model")):
            with pytest.raises(RequestError, match=message):
                await engine.logits(ids)
        with pytest.raises(RequestError, match="positions 5 to 5 are outside"):
            await engine.logits_at((1, 2), (5,))
        assert all(member.failure is None and member.probe is None for member in engine._members)
        await engine.close()

    asyncio.run(main())


def test_what_one_kind_of_engine_declines_another_kind_may_take(load: Callable[..., Guarded]) -> None:
    able = load()
    members = [*(load(capabilities=able.info.capabilities - {"seed"}) for _ in range(2)), able]
    engine = SpreadEngine(members, tries=2)
    asked = request((1, 2, 3), 12)
    for member in members[:2]:
        member.failure = DeclinedRequest("that is not for me")

    async def main() -> None:
        expected = (await answer(able.engine, asked)).ids
        assert (await answer(engine, asked)).ids == expected
        assert [member.served for member in members] == [1, 0, 1], "engines of one kind agree"
        assert all(member.failure is None for member in engine._members)
        able.failure = DeclinedRequest("nor for me")
        with pytest.raises(DeclinedRequest, match="nor for me"):
            await answer(engine, asked)
        able.failure = RuntimeError("the card is lost")
        with pytest.raises(RequestError, match=r"\(engine 2\) failed: the card is lost"):
            await asyncio.wait_for(answer(engine, asked), 10)
        await engine.close()

    asyncio.run(main())


def test_a_broken_engine_fails_its_requests_and_gets_no_more(load: Callable[..., Guarded]) -> None:
    members = [load(device="npu:0"), load(device="npu:1")]
    engine = SpreadEngine(members)
    asked = [request((1, 2, 3 + index), 12) for index in range(8)]

    async def main() -> None:
        expected = [(await answer(members[1].engine, each)).ids for each in asked]
        members[0].failure = RuntimeError("the card is lost")
        outcomes = await asyncio.gather(*(answer(engine, each) for each in asked), return_exceptions=True)
        for outcome in outcomes[0::2]:
            assert isinstance(outcome, RequestError)
            assert str(outcome) == "torch on npu:0 (engine 0) failed: the card is lost"
        assert [outcome.ids for outcome in outcomes[1::2]] == expected[1::2]  # type: ignore[union-attr]
        assert [each.ids for each in await answers(engine, asked)] == expected
        assert members[0].served == 4 + 1, "its four requests, and the one that found it broken"
        members[1].failure = RuntimeError("so is this one")
        with pytest.raises(RequestError, match=r"npu:1 \(engine 1\) failed: so is this one"):
            await answer(engine, asked[0])
        with pytest.raises(RequestError, match=r"no engine is left: .*npu:0 .*the card is lost; .*npu:1 .*so is this"):
            await answer(engine, asked[0])
        await engine.close()

    asyncio.run(main())


def test_an_engine_that_failed_once_is_used_again(load: Callable[..., Guarded]) -> None:
    only = load()
    engine = SpreadEngine([only])

    async def main() -> None:
        only.failure = RuntimeError("a passing fault")
        with pytest.raises(RequestError, match="a passing fault"):
            await answer(engine, request((1, 2, 3), 4))
        only.failure = None
        assert len((await answer(engine, request((1, 2, 3), 4))).ids) == 4
        await engine.close()

    asyncio.run(main())


def test_a_request_may_begin_again_where_that_is_wanted(load: Callable[..., Guarded]) -> None:
    members = [load(device="npu:0"), load(device="npu:1")]
    engine = SpreadEngine(members, tries=2)
    asked = request((1, 2, 3), 12)

    async def main() -> None:
        expected = (await answer(members[1].engine, asked)).ids
        whole = await members[1].engine.logits((1, 2, 3))
        members[0].failure = RuntimeError("the card is lost")
        assert (await answer(engine, asked)).ids == expected
        assert [member.served for member in members] == [1 + 1, 1], "and the one that found it broken"
        np.testing.assert_array_equal(await engine.logits((1, 2, 3)), whole)
        members[1].failure = RuntimeError("so is this one")
        with pytest.raises(RequestError, match=r"npu:1 \(engine 1\) failed: so is this one"):
            await answer(engine, asked)
        await engine.close()

    asyncio.run(main())


def test_a_request_that_has_given_a_token_does_not_begin_again(load: Callable[..., Guarded]) -> None:
    members = [load(), load()]
    engine = SpreadEngine(members, tries=2)

    async def main() -> None:
        deltas = engine.generate(request((1, 2, 3), 12))
        given = len((await anext(deltas)).ids)
        members[0].failure = RuntimeError("the card is lost")
        assert given
        with pytest.raises(RequestError, match=r"the card is lost \(\d+ tokens? had come; ask again for the whole\)"):
            await anext(deltas)
        assert members[1].served == 0
        await engine.close()

    asyncio.run(main())


def test_a_trial_that_its_event_loop_broke_off_is_made_again(load: Callable[..., Guarded]) -> None:
    only = load()
    engine = SpreadEngine([only])

    async def fail() -> None:
        only.failure = RuntimeError("a passing fault")
        with pytest.raises(RequestError):
            await answer(engine, request((1, 2, 3), 4))
        only.failure, only.stall = None, asyncio.Event()
        await asyncio.sleep(0)

    async def go_on() -> None:
        only.stall = None
        assert len((await answer(engine, request((1, 2, 3), 4))).ids) == 4
        await engine.close()

    asyncio.run(fail())
    asyncio.run(go_on())


def test_closing_ends_what_runs_and_closes_every_engine(load: Callable[..., Guarded]) -> None:
    members = [load(), load()]
    engine = SpreadEngine(members)

    async def main() -> None:
        running = [asyncio.create_task(answer(engine, request((1, 2, 3), 900))) for _ in range(2)]
        while sum(member.served for member in members) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        members[0].close_failure = RuntimeError("would not close")
        with pytest.raises(RuntimeError, match="would not close"):
            await engine.close()
        assert [(await task).finish_reason for task in running] == ["cancelled", "cancelled"]
        assert [member.closed for member in members] == [1, 1]
        with pytest.raises(RequestError, match=r"^the engine is closed; create a new one"):
            await answer(engine, request((1,), 2))
        with pytest.raises(RequestError, match=r"^the engine is closed; create a new one"):
            await engine.logits((1,))
        members[0].close_failure = None
        await engine.close()

    asyncio.run(main())


def test_engines_must_hold_the_same_model_in_the_same_way(load: Callable[..., Guarded]) -> None:
    engine = load()
    other = load(dtype="bfloat16")
    with pytest.raises(BackendError, match=r"must have the same dtype; found \['float32', 'bfloat16'\]"):
        SpreadEngine([engine, other])
    with pytest.raises(BackendError, match="there is no engine to spread requests over"):
        SpreadEngine([])
    asyncio.run(engine.close())
    asyncio.run(other.close())


class Meter:
    """Fixed figures."""

    source = "torch.npu allocator"

    def __init__(self, use: MemoryUse, resets: bool = True) -> None:
        self.use, self.resets, self.reset = use, resets, 0

    def read(self) -> MemoryUse:
        return self.use

    def reset_peak(self) -> bool:
        self.reset += 1
        return self.resets


def test_memory_is_the_sum_where_every_engine_has_a_meter(load: Callable[..., Guarded]) -> None:
    members = [load(), load()]
    engine = SpreadEngine(members)
    assert engine.memory_meter is None
    members[0].memory_meter = Meter(MemoryUse(1, 2, 3, None), resets=False)
    assert engine.memory_meter is None
    members[1].memory_meter = Meter(MemoryUse(10, 20, 30, 40))
    meter = engine.memory_meter
    assert isinstance(meter, SummedMemory)
    assert meter.source == "torch.npu allocator; sum of 2 devices"
    assert meter.read() == MemoryUse(11, 22, 33, None)
    assert meter.reset_peak() is False
    assert [member.memory_meter.reset for member in members] == [1, 1]  # type: ignore[union-attr]
    asyncio.run(engine.close())
