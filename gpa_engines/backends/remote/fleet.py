"""The engine made of servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import GpaError, RequestError
from gpa_engines.backends.remote.admission import Admission
from gpa_engines.backends.remote.local_model import LocalModel, expected_fingerprint
from gpa_engines.backends.remote.settings import FleetSettings
from gpa_engines.engine import EngineInfo, GenerationRequest, GivesRows, TokenDelta
from gpa_engines.passing_thread import in_passing_thread
from gpa_engines.servers.http_server import HttpServer, ServerLost, ServerUnreachable, StalledStream
from gpa_engines.servers.kind import ExpectedModel, ServerEngine, open_server
from gpa_engines.spread_engine import SpreadEngine

AWAY = (ServerUnreachable, ServerLost, StalledStream)
"""What a server does that is not there, or not yet. Everything else is a mistake that waiting does not mend."""


def build_engine(folder: Path, settings: FleetSettings) -> SpreadEngine:
    """What :func:`gpa_engines.backends.remote.create_engine` does, once the options are checked."""
    local = LocalModel.read(folder)
    expected = ExpectedModel(
        local.config.vocab_size,
        local.config.max_position_embeddings,
        local.end_ids,
        settings.dtype,
        folder,
        settings.served_name,
    )
    servers = [HttpServer(access) for access in settings.servers]

    def start() -> SpreadEngine:
        # Before the servers are asked: it may load weights and takes a loop of its own.
        admission = Admission(local.names, expected_fingerprint(folder, settings.expect))
        fleet = [RemoteServer(server, expected, admission, local.config.dtype) for server in servers]
        return asyncio.run(_start(fleet, admission, settings))

    # The caller's thread may be running an event loop.
    return in_passing_thread(start)


async def _start(fleet: Sequence[RemoteServer], admission: Admission, settings: FleetSettings) -> SpreadEngine:
    """Let in every server that is there. Raises what is wrong with one that is, and where none is there."""
    away: list[Exception] = []
    try:
        for each, outcome in zip(fleet, await asyncio.gather(*(each.open() for each in fleet)), strict=True):
            try:
                if outcome is not None:
                    raise outcome
                await each.admit()
            except AWAY as error:
                away.append(error)
        there = [each for each in fleet if each.is_open]
        if not there:
            raise away[0] if len(away) == 1 else ServerUnreachable("; ".join(map(str, away)))
        for each in fleet:
            each.stand_in_for(there[0])
        engine = SpreadEngine(fleet, tries=settings.tries, recheck=settings.recheck, holder="the smallest server")
        admission.promise(engine.info)
        await engine.look()
        return engine
    finally:
        for each in fleet:
            await each.disconnect()


class RemoteServer:
    """One server of several: an Engine that can be away, and is examined again whenever it comes back."""

    def __init__(self, server: HttpServer, expected: ExpectedModel, admission: Admission, own_dtype: str) -> None:
        """own_dtype: config.json's, where neither the caller nor the server says one."""
        self._server = server
        self._expected = expected
        self._admission = admission
        self._own_dtype = own_dtype
        self._engine: ServerEngine | None = None
        # Answers may still come through those from before a check.
        self._engines: WeakSet[ServerEngine] = WeakSet()
        self._info: EngineInfo | None = None
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        """Of the server, or of one beside it as long as it has not been there."""
        assert self._info is not None, "a server that was never there stands in for another one"
        return self._info

    @property
    def is_open(self) -> bool:
        """Whether the server was let in."""
        return self._info is not None

    async def open(self) -> Exception | None:
        """Find out what the server is; gives what went wrong, if anything did."""
        try:
            self._engine = await open_server(self._server, self._expected)
        except GpaError as error:
            return error
        self._engines.add(self._engine)
        return None

    async def admit(self) -> None:
        """Let the opened server in. Raises BackendError, ServerError."""
        assert self._engine is not None
        info = self._engine.info
        if info.dtype == "auto":
            info = replace(info, dtype=self._own_dtype)
        source = await self._admission.admit(self._engine, info)
        self._info = replace(info, note="; ".join(filter(None, (info.note, source))))

    def stand_in_for(self, other: RemoteServer) -> None:
        """Take over what another server says of itself, if this one was not there."""
        if self._info is None:
            self._engine = None
            self._info = replace(other.info, device=self._server.url)

    async def check(self) -> None:
        """See :class:`gpa_engines.spread_engine.Shared`: a server that comes back may be another one."""
        self._check_open()
        self._engine = None
        if (error := await self.open()) is not None:
            raise error
        try:
            await self.admit()
        except BaseException:
            self._engine = None
            raise

    async def busy(self) -> int:
        """See :class:`gpa_engines.spread_engine.Shared`."""
        return await (await self._opened()).busy()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See :meth:`gpa_engines.engine.Engine.generate`. Raises ServerError."""
        engine = await self._opened()
        async with aclosing(engine.generate(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """See :meth:`gpa_engines.engine.Engine.logits`."""
        return await (await self._opened()).logits(ids)

    async def logits_at(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`gpa_engines.engine.GivesRows`."""
        engine = await self._opened()
        if isinstance(engine, GivesRows):
            return await engine.logits_at(ids, positions)
        return (await engine.logits(ids))[np.asarray(positions, np.int64)]

    async def disconnect(self) -> None:
        """Drop the connections of this event loop; the next one opens its own."""
        await self._server.close()

    async def close(self) -> None:
        """End what runs (reason "cancelled") and drop the connections. Closing twice is harmless."""
        self._closed = True
        for engine in list(self._engines):
            await engine.close()
        await self._server.close()

    async def _opened(self) -> ServerEngine:
        self._check_open()
        if self._engine is None:
            raise ServerUnreachable(f"{self._server.url} was not there when it was last asked")
        return self._engine

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the engine is closed; create a new one")
