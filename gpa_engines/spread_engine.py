"""One Engine made of several that hold the same model: every request goes to the one that is least busy.

It knows nothing but the Engine protocol. A request stays where it began. An engine that fails one is asked for a token
of its own, and gets no requests until it has given it; one that cannot is left out from then on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, CapacityError, RequestError
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

ALIKE = ("vocab_size", "dtype", "logit_ids", "tokenizer_sha256")
"""What the engines' infos must agree in, lest an answer depend on where it is given."""


@dataclass(eq=False, slots=True)
class _Member:
    """open: requests that run or wait in the engine. failure: its last, while it is not known to work again."""

    engine: Engine
    name: str
    open: int = 0
    failure: Exception | None = None
    probe: asyncio.Task[None] | None = None


class SpreadEngine:
    """An Engine over several, which it owns: closing it closes them."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        """Raises BackendError for no engine at all, and for engines that do not hold the same model in the same way."""
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
        request.check_against(self._info.vocab_size, self._info.max_context)
        async with self._chosen() as engine, aclosing(engine.generate(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """See :meth:`gpa_engines.engine.Engine.logits`."""
        self._check_prompt(ids)
        async with self._chosen() as engine:
            return await engine.logits(ids)

    async def logits_at(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`gpa_engines.engine.GivesRows`."""
        self._check_prompt(ids)
        wanted = np.asarray(positions, np.int64)
        check_positions(wanted, len(ids))
        async with self._chosen() as engine:
            if isinstance(engine, GivesRows):
                return await engine.logits_at(ids, positions)
            return (await engine.logits(ids))[wanted]

    async def close(self) -> None:
        """Close every engine, also when closing one of them fails, which is raised in the end."""
        self._closed = True
        for member in self._members:
            if member.probe is not None:
                member.probe.cancel()
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

    @asynccontextmanager
    async def _chosen(self) -> AsyncIterator[Engine]:
        """The least busy engine, counted as busier meanwhile; its failures are told from refusals of a request."""
        member = await self._choose()
        member.open += 1
        try:
            yield member.engine
        except Exception as error:
            if self._closed or isinstance(error, CapacityError):
                raise
            member.failure = error
            self._start_probe(member)
            raise RequestError(f"{member.name} failed: {error}") from error
        finally:
            member.open -= 1

    async def _choose(self) -> _Member:
        while True:
            if self._closed:
                raise RequestError("the engine is closed; create a new one")
            working = [each for each in self._members if each.failure is None]
            if working:
                return min(working, key=lambda member: member.open)
            for member in self._members:
                if member.probe is not None and member.probe.cancelled():  # with the event loop that it began in
                    self._start_probe(member)
            probes = [each.probe for each in self._members if each.probe is not None and not each.probe.done()]
            if not probes:
                raise RequestError(
                    "no engine is left: "
                    + "; ".join(f"{each.name} failed: {each.failure}" for each in self._members)
                    + "; create a new engine"
                )
            await asyncio.wait(probes, return_when=asyncio.FIRST_COMPLETED)

    def _start_probe(self, member: _Member) -> None:
        if member.probe is None or member.probe.done():
            member.probe = asyncio.create_task(self._probe(member))

    async def _probe(self, member: _Member) -> None:
        """Trust the engine again if it can give one token; else it keeps its failure and gets no requests."""
        request = GenerationRequest((0,), SamplingParams(max_new_tokens=1), allowed=self._info.logit_ids)
        try:
            async with aclosing(member.engine.generate(request)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason in ("stop", "length"):
                        member.failure = None
        except Exception as error:
            member.failure = error


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
