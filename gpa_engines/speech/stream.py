"""Pieces of one call, worked on side by side and delivered in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

SourceT = TypeVar("SourceT")
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

Work = Callable[[int, SourceT, Callable[[ItemT], None]], Awaitable[None]]
"""Called with a piece's index, the piece and a function that delivers one item of it."""


class ResultStream(Generic[ItemT, ResultT]):
    """An asynchronous iterator over the parts of a call, and its result once the last part is out.

    Closing it early cancels what still runs.
    """

    def __init__(self, items: AsyncGenerator[ItemT, None], result: Callable[[], ResultT]) -> None:
        self._items = items
        self._result = result
        self._complete = False

    def __aiter__(self) -> AsyncIterator[ItemT]:
        return self

    async def __anext__(self) -> ItemT:
        try:
            return await anext(self._items)
        except StopAsyncIteration:
            self._complete = True
            raise

    async def aclose(self) -> None:
        """Cancel what still runs."""
        await self._items.aclose()

    @property
    def result(self) -> ResultT:
        """The whole result; RuntimeError before the last part has been taken."""
        if not self._complete:
            raise RuntimeError("the stream has not been read to its end")
        return self._result()

    async def drain(self) -> ResultT:
        """Read to the end and return the result."""
        async for _ in self:
            pass
        return self.result


async def in_order(
    sources: Sequence[SourceT], work: Work[SourceT, ItemT], concurrency: int
) -> AsyncGenerator[tuple[int, ItemT], None]:
    """(piece, item) of all pieces in the order of the pieces, with up to `concurrency` pieces at work at once.

    The first failure ends the stream; the other pieces are cancelled before it is raised, as they are when the stream
    is closed early.
    """
    running: deque[tuple[int, asyncio.Queue[_Item[ItemT] | None], asyncio.Task[None]]] = deque()
    waiting = deque(enumerate(sources))

    async def run(index: int, source: SourceT, queue: asyncio.Queue[_Item[ItemT] | None]) -> None:
        try:
            await work(index, source, lambda item: queue.put_nowait(_Item(item)))
        finally:
            queue.put_nowait(None)

    try:
        while waiting or running:
            while waiting and len(running) < concurrency:
                index, source = waiting.popleft()
                queue: asyncio.Queue[_Item[ItemT] | None] = asyncio.Queue()
                running.append((index, queue, asyncio.create_task(run(index, source, queue))))
            index, queue, task = running[0]
            while (item := await queue.get()) is not None:
                yield index, item.value
            await task
            running.popleft()
    finally:
        for _, _, task in running:
            task.cancel()
        await asyncio.gather(*(task for _, _, task in running), return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Item(Generic[ItemT]):
    """Tells an item from the end of the queue."""

    value: ItemT
