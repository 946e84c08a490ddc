"""One Engine made of several that hold the same model: every request goes to the one that is least busy.

It knows nothing but the Engine protocol, and `Shared` for engines that are elsewhere. A request that has given a token
stays where it began; one that has not may begin again on another engine, and what one kind of engine declines another
kind may take. An engine that fails is asked to show that it works, with a token of its own or as it knows best, and
gets no requests until it has. One of this process that cannot is left out from then on; a shared one is asked again
from time to time, as long as requests come.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, CapacityError, DeclinedRequest, RequestError
from gpa_engines.engine import (
    Engine,
    EngineInfo,
    GenerationRequest,
    GivesRows,
    SamplingParams,
    TokenDelta,
    check_ids,
    check_positions,
)
from gpa_engines.memory import MemoryMeter, MemoryReport, SummedMemory

T = TypeVar("T")

ALIKE = ("vocab_size", "dtype", "logit_ids", "tokenizer_sha256")
"""What the engines' infos must agree in, lest an answer depend on where it is given."""


LOOK_EVERY = 1.0
"""Seconds for which what a shared engine said of its load is believed."""


@runtime_checkable
class Shared(Protocol):
    """An engine that others use too, and that may go away and come back."""

    async def busy(self) -> int:
        """Requests that it has of everybody, running or waiting. Raises if it cannot be used."""
        ...

    async def check(self) -> None:
        """Raise unless it works and still holds the model."""
        ...


@dataclass(eq=False, slots=True)
class _Member:
    """open: our requests that run or wait in the engine. others: other people's, when it was last asked.

    failure: its last, while it is not known to work again. probed, looked: when it was last asked, in seconds of the
    monotonic clock.
    """

    engine: Engine
    name: str
    open: int = 0
    others: int = 0
    failure: Exception | None = None
    probe: asyncio.Task[None] | None = None
    probed: float = 0.0
    look: asyncio.Task[None] | None = None
    looked: float = 0.0


class _EngineFailed(RequestError):
    """A request ended because its engine did."""


class SpreadEngine:
    """An Engine over several, which it owns: closing it closes them."""

    def __init__(
        self, engines: Sequence[Engine], *, tries: int = 1, recheck: float = 5.0, holder: str = "the model"
    ) -> None:
        """Raises BackendError for no engine at all, and for engines that do not hold the same model in the same way.

        tries: engines on which a request may begin before it is given up. recheck: seconds after which a shared engine
        that failed is asked again. holder: whose limit the context is, for messages.
        """
        if not engines:
            raise BackendError("there is no engine to spread requests over; expected at least one")
        infos = [engine.info for engine in engines]
        for name in ALIKE:
            values = [getattr(info, name) for info in infos]
            if any(value != values[0] for value in values):
                raise BackendError(f"engines that share requests must have the same {name}; found {values}")
        self._info = _joint_info(infos)
        self._members = [
            _Member(engine, f"{engine.info.backend} on {engine.info.device} (engine {number})")
            for number, engine in enumerate(engines)
        ]
        self._tries = tries
        self._recheck = recheck
        self._holder = holder
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        """Devices joined by commas; capabilities and context that every engine has."""
        return self._info

    @property
    def memory_meter(self) -> MemoryMeter | None:
        """The sum over all engines, which are on devices of their own; None where one has no meter."""
        meters = [each.engine.memory_meter if isinstance(each.engine, MemoryReport) else None for each in self._members]
        known = [meter for meter in meters if meter is not None]
        return SummedMemory(known) if len(known) == len(meters) else None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See :meth:`gpa_engines.engine.Engine.generate`. Raises RequestError naming the engine that failed."""
        request.check_against(self._info.vocab_size, self._info.max_context, self._holder)
        tried: list[_Member] = []
        unfit: list[_Member] = []
        while True:
            member = await self._choose([*tried, *unfit])
            given = 0
            try:
                async with self._using(member) as engine, aclosing(engine.generate(request)) as deltas:
                    async for delta in deltas:
                        given += len(delta.ids)
                        yield delta
                return
            except DeclinedRequest:
                # What one kind of engine cannot do, another may; engines of one kind agree.
                capabilities = member.engine.info.capabilities
                unfit += [each for each in self._members if each.engine.info.capabilities == capabilities]
                if given or not self._working([*tried, *unfit]):
                    raise
            except _EngineFailed as failure:
                if given:
                    raise RequestError(
                        f"{failure} ({given} {'tokens' if given > 1 else 'token'} had come; ask again for the whole)"
                    ) from failure
                self._note_try(tried, member, failure, unfit)

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """See :meth:`gpa_engines.engine.Engine.logits`."""
        self._check_prompt(ids)
        return await self._ask(lambda engine: engine.logits(ids))

    async def logits_at(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`gpa_engines.engine.GivesRows`."""
        self._check_prompt(ids)
        wanted = np.asarray(positions, np.int64)
        check_positions(wanted, len(ids))

        async def rows(engine: Engine) -> NDArray[np.float32]:
            if isinstance(engine, GivesRows):
                return await engine.logits_at(ids, positions)
            return (await engine.logits(ids))[wanted]

        return await self._ask(rows)

    async def look(self) -> None:
        """Ask every shared engine for its load, and wait for all answers; one that gives none counts as failed."""
        await asyncio.gather(*(self._look(member) for member in self._members))

    async def close(self) -> None:
        """Close every engine, also when closing one of them fails, which is raised in the end."""
        self._closed = True
        for member in self._members:
            for task in (member.probe, member.look):
                if task is not None and task.get_loop() is asyncio.get_running_loop():
                    task.cancel()
        outcomes = await asyncio.gather(*(each.engine.close() for each in self._members), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if not len(ids):
            raise RequestError("ids is empty; logits needs at least one token id")
        check_ids("ids", ids, self._info.vocab_size)
        if len(ids) > self._info.max_context:
            raise CapacityError(f"{len(ids)} ids; the model has {self._info.max_context} positions: give fewer")

    async def _ask(self, question: Callable[[Engine], Awaitable[T]]) -> T:
        tried: list[_Member] = []
        while True:
            member = await self._choose(tried)
            try:
                async with self._using(member) as engine:
                    return await question(engine)
            except _EngineFailed as failure:
                self._note_try(tried, member, failure)

    def _note_try(
        self, tried: list[_Member], member: _Member, failure: _EngineFailed, unfit: Sequence[_Member] = ()
    ) -> None:
        """Let the request begin again on an engine that it has not tried; raises the failure where there is none."""
        tried.append(member)
        if len(tried) >= self._tries or not self._working([*tried, *unfit]):
            raise failure

    def _working(self, without: Collection[_Member]) -> list[_Member]:
        return [each for each in self._members if each.failure is None and each not in without]

    @asynccontextmanager
    async def _using(self, member: _Member) -> AsyncIterator[Engine]:
        """An engine, counted as busier meanwhile; its failures are told from requests that it declines."""
        member.open += 1
        try:
            yield member.engine
        except Exception as error:
            if self._closed or isinstance(error, DeclinedRequest):
                raise
            self._fail(member, error)
            raise _EngineFailed(f"{member.name} failed: {error}") from error
        finally:
            member.open -= 1

    def _fail(self, member: _Member, error: Exception) -> None:
        member.failure = error
        self._start_probe(member)

    async def _choose(self, tried: Collection[_Member] = ()) -> _Member:
        while True:
            if self._closed:
                raise RequestError("the engine is closed; create a new one")
            self._look_again()
            if working := self._working(tried):
                least = min(each.open + each.others for each in working)
                equal = [each for each in working if each.open + each.others == least]
                # Many processes may share these engines, and must not all begin with the same one.
                return random.choice(equal) if isinstance(equal[0].engine, Shared) else equal[0]
            await self._wait_for_one()

    async def _wait_for_one(self) -> None:
        """Until a failed engine works again. Raises RequestError when each was asked and none does."""
        for member in self._members:
            if isinstance(member.engine, Shared) or _broken_off(member.probe):
                self._start_probe(member)
        waiting = {each.probe for each in self._members if each.probe is not None and not each.probe.done()}
        while waiting:
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if any(each.failure is None for each in self._members):
                return
        failures = "; ".join(f"{each.name} failed: {each.failure}" for each in self._members)
        if all(isinstance(each.engine, Shared) for each in self._members):
            raise RequestError(f"no engine is left: {failures}; they are asked again with the next request")
        raise RequestError(f"no engine is left: {failures}; create a new engine")

    def _look_again(self) -> None:
        """Ask shared engines, beside the requests, what may have changed: the load of those that work, and whether
        those that failed have come back.
        """
        now = time.monotonic()
        for member in self._members:
            if not isinstance(member.engine, Shared):
                continue
            if member.failure is not None:
                if now - member.probed >= self._recheck:
                    self._start_probe(member)
            elif now - member.looked >= LOOK_EVERY and (member.look is None or _ended(member.look)):
                member.look = asyncio.create_task(self._look(member))

    async def _look(self, member: _Member) -> None:
        if not isinstance(member.engine, Shared):
            return
        member.looked = time.monotonic()
        ours = member.open
        try:
            everybody = await member.engine.busy()
        except Exception as error:
            if not self._closed and member.failure is None:
                self._fail(member, error)
        else:
            # Requests that ended meanwhile are in one count and not in the other.
            member.others = max(0, everybody - max(ours, member.open))

    def _start_probe(self, member: _Member) -> None:
        if member.probe is None or _ended(member.probe):
            member.probed = time.monotonic()
            member.probe = asyncio.create_task(self._probe(member))

    async def _probe(self, member: _Member) -> None:
        """Trust the engine again if it shows that it works; else it keeps its failure and gets no requests."""
        try:
            if isinstance(member.engine, Shared):
                await member.engine.check()
                member.failure = None
            elif await _gives_a_token(member.engine, self._info):
                member.failure = None
        except Exception as error:
            member.failure = error


async def _gives_a_token(engine: Engine, info: EngineInfo) -> bool:
    request = GenerationRequest((0,), SamplingParams(max_new_tokens=1), allowed=info.logit_ids)
    async with aclosing(engine.generate(request)) as deltas:
        return any([delta.finish_reason in ("stop", "length") async for delta in deltas])


def _broken_off(task: asyncio.Task[None] | None) -> bool:
    """Whether the task's event loop ended before it did."""
    return task is not None and (task.cancelled() or (not task.done() and _ended(task)))


def _ended(task: asyncio.Task[None]) -> bool:
    return task.done() or task.get_loop() is not asyncio.get_running_loop()


def _joint_info(infos: Sequence[EngineInfo]) -> EngineInfo:
    notes = [*dict.fromkeys(info.note for info in infos if info.note)]
    if len(infos) > 1:
        notes.append(f"requests are spread over {len(infos)} engines")
    return replace(
        infos[0],
        backend=_joined(info.backend for info in infos),
        device=",".join(info.device for info in infos),
        max_context=min(info.max_context for info in infos),
        capabilities=frozenset.intersection(*(info.capabilities for info in infos)),
        note="; ".join(notes),
    )


def _joined(names: Iterable[str]) -> str:
    return ",".join(dict.fromkeys(names))
