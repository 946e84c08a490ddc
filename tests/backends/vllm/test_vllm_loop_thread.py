"""Streams from a loop on a thread of its own to readers on whatever loops come."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator

import pytest

from gpa_engines.backends.vllm.loop_thread import LoopThread, Stream, StreamEnded


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("test-loop")
    yield thread
    thread.stop(lambda: None)


class Counting:
    """Numbers without an end; `open` is how many generators have not been closed."""

    def __init__(self) -> None:
        self.open = 0

    async def __call__(self) -> AsyncGenerator[int, None]:
        self.open += 1
        try:
            number = 0
            while True:
                yield number
                number += 1
                await asyncio.sleep(0.001)
        finally:
            self.open -= 1


async def read(stream: Stream[int], count: int) -> list[int]:
    return [await stream.receive() for _ in range(count)]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def test_several_loops_one_after_the_other_read_from_it(thread: LoopThread) -> None:
    numbers = Counting()

    async def take() -> list[int]:
        stream = thread.stream(numbers)
        try:
            return await read(stream, 3)
        finally:
            stream.cancel()

    for _ in range(3):
        assert asyncio.run(take()) == [0, 1, 2]
    wait_until(lambda: numbers.open == 0)


def test_the_generators_error_and_its_end_reach_the_reader(thread: LoopThread) -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise KeyError("cause")

    async def ending() -> AsyncGenerator[int, None]:
        yield 1

    async def take() -> None:
        stream = thread.stream(failing)
        assert await stream.receive() == 1
        with pytest.raises(KeyError, match="cause"):
            await stream.receive()
        ended = thread.stream(ending)
        assert await ended.receive() == 1
        with pytest.raises(StopAsyncIteration):
            await ended.receive()

    asyncio.run(take())


def test_a_reader_whose_loop_is_gone_closes_the_generator(thread: LoopThread) -> None:
    numbers = Counting()

    async def leave() -> None:
        await read(thread.stream(numbers), 2)

    asyncio.run(leave())
    gc.collect()
    wait_until(lambda: numbers.open == 0)


def test_cancelling_before_it_has_begun_begins_nothing(thread: LoopThread) -> None:
    numbers, started = Counting(), threading.Event()

    async def leave() -> None:
        thread.call(lambda: asyncio.sleep(0))
        stream = thread.stream(numbers)
        stream.cancel()
        stream.cancel()

    asyncio.run(leave())
    thread.call(lambda: asyncio.sleep(0.02))
    assert (numbers.open, started.is_set()) == (0, False)


def test_stopping_ends_streams_calls_the_last_function_once_and_refuses_more(thread: LoopThread) -> None:
    numbers, last = Counting(), []

    async def take() -> None:
        stream = thread.stream(numbers)
        await read(stream, 2)
        stopping = [asyncio.to_thread(thread.stop, lambda: last.append(numbers.open)) for _ in range(3)]
        await asyncio.gather(*stopping)
        with pytest.raises(StreamEnded):
            await read(stream, 1000)
        with pytest.raises(StreamEnded):
            thread.stream(numbers)

    asyncio.run(take())
    assert last == [0]


def test_a_call_returns_and_raises_what_the_coroutine_does(thread: LoopThread) -> None:
    async def name() -> str:
        return threading.current_thread().name

    async def fail() -> None:
        raise KeyError("cause")

    assert thread.call(name) == "test-loop"
    with pytest.raises(KeyError, match="cause"):
        thread.call(fail)
