"""An event loop on a thread of its own, and streams from it to whatever loops their readers are on.

vLLM's client binds itself to the event loop that it is made on. Engines are used on one loop after another, so it gets
one that lasts as long as it does.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class StreamEnded(Exception):
    """The thread was stopped while a stream was open."""


class LoopThread:
    """Daemon thread that runs an event loop until it is stopped."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._streams: set[Stream[Any]] = set()
        self._lock = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine on the thread, wait for it, and return or raise what it did."""

        async def awaited() -> T:
            return await function()

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result()

    def stream(self, make: Callable[[], AsyncGenerator[T, None]]) -> Stream[T]:
        """Run an async generator on the thread; its items are received on the caller's loop.

        Raises StreamEnded once the thread is stopped.
        """
        stream: Stream[T] = Stream(self._loop)
        with self._lock:
            if self._stopped:
                raise StreamEnded
            self._loop.call_soon_threadsafe(self._open, stream, make)
        return stream

    def stop(self, at_last: Callable[[], object]) -> None:
        """End all streams, call `at_last` on the thread, and wait for its end. Any number of threads may call this."""
        with self._lock:
            first, self._stopped = not self._stopped, True
            if first:
                asyncio.run_coroutine_threadsafe(self._end(at_last), self._loop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _open(self, stream: Stream[T], make: Callable[[], AsyncGenerator[T, None]]) -> None:
        if stream.cancelled:
            return
        stream.task = self._loop.create_task(self._pump(stream, make))
        self._streams.add(stream)
        stream.task.add_done_callback(lambda _: self._streams.discard(stream))

    async def _pump(self, stream: Stream[T], make: Callable[[], AsyncGenerator[T, None]]) -> None:
        try:
            async with aclosing(make()) as items:
                async for item in items:
                    if not stream.put(item):  # its reader's loop is closed
                        return
        except asyncio.CancelledError:
            stream.put(StreamEnded())
            raise
        except Exception as error:
            stream.put(error)
        else:
            stream.put(StopAsyncIteration())

    async def _end(self, at_last: Callable[[], object]) -> None:
        try:
            tasks = [stream.task for stream in self._streams if stream.task is not None]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            at_last()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            if rest:
                await asyncio.wait(rest, timeout=1)
        finally:
            self._loop.call_soon(self._loop.stop)


class Stream(Generic[T]):
    """Items on their way to the loop that asked for them."""

    def __init__(self, source: asyncio.AbstractEventLoop) -> None:
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False
        self._source = source
        self._reader = asyncio.get_running_loop()
        self._items: asyncio.Queue[T | Exception] = asyncio.Queue()

    async def receive(self) -> T:
        """The next item; raises what the generator raised, StopAsyncIteration at its end and StreamEnded."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        """Close the generator, from any thread; harmless once it has ended."""
        self.cancelled = True
        _post(self._source, self._cancel_task)

    def put(self, item: T | Exception) -> bool:
        return _post(self._reader, self._items.put_nowait, item)

    def _cancel_task(self) -> None:
        if self.task is not None:
            self.task.cancel()


def _post(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> bool:
    """Run `function` on the loop's thread; False where the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True
