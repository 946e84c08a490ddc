"""Pieces run side by side and arrive in order; a failure or an early close leaves nothing running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest

from gpa_engines.speech.stream import ResultStream, in_order


async def collect(stream: AsyncGenerator[tuple[int, str], None]) -> list[tuple[int, str]]:
    return [item async for item in stream]


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_items_arrive_in_the_order_of_the_pieces(concurrency: int) -> None:
    async def work(index: int, source: str, emit: Callable[[str], None]) -> None:
        for character in source:
            emit(character)
            for _ in range(3 - index):  # later pieces finish first
                await asyncio.sleep(0)

    items = asyncio.run(collect(in_order(["ab", "", "cd"], work, concurrency)))
    assert items == [(0, "a"), (0, "b"), (2, "c"), (2, "d")]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_pieces_run_than_asked_for(concurrency: int) -> None:
    running = most = 0

    async def work(index: int, source: int, emit: Callable[[str], None]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    asyncio.run(collect(in_order(range(7), work, concurrency)))
    assert most == concurrency


def test_a_failure_cancels_the_other_pieces() -> None:
    ended: list[str] = []

    async def work(index: int, source: str, emit: Callable[[str], None]) -> None:
        if index == 0:
            emit("first")
            raise ValueError("piece 0 failed")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(source)
            raise

    async def run() -> list[tuple[int, str]]:
        items = []
        async for item in in_order(["a", "b", "c"], work, 3):
            items.append(item)
            await asyncio.sleep(0)
        return items

    with pytest.raises(ValueError, match="piece 0 failed"):
        asyncio.run(run())
    assert sorted(ended) == ["b", "c"]


def test_closing_early_cancels_what_runs() -> None:
    ended: list[int] = []

    async def work(index: int, source: int, emit: Callable[[int], None]) -> None:
        emit(source)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(index)

    async def run() -> None:
        stream = in_order([10, 20], work, 2)
        assert await anext(stream) == (0, 10)
        await stream.aclose()

    asyncio.run(run())
    assert sorted(ended) == [0, 1]


def test_the_result_is_there_only_at_the_end() -> None:
    async def items() -> AsyncGenerator[int, None]:
        yield 1
        yield 2

    async def run() -> None:
        stream = ResultStream(items(), lambda: "whole")
        await anext(stream)
        with pytest.raises(RuntimeError, match="not been read to its end"):
            _ = stream.result
        assert await stream.drain() == "whole"
        assert stream.result == "whole"

    asyncio.run(run())
