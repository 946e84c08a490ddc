"""A fake HTTP server in a thread: what it answers is said by the test, byte for byte where that matters."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Asked:
    """One request. headers: names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """parts: a body at once, or pieces as they come. whole: whether the end is said, or the connection just breaks."""

    parts: bytes | AsyncGenerator[bytes, None] = b""
    status: int = 200
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    whole: bool = True


def json_reply(value: Any, status: int = 200) -> Reply:
    return Reply(json.dumps(value).encode(), status)


def events_reply(*events: Any, done: bool = True, whole: bool = True) -> Reply:
    """A stream of events: values as JSON, bytes as they are."""

    async def parts() -> AsyncGenerator[bytes, None]:
        for event in events:
            yield b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
        if done:
            yield b"data: [DONE]\n\n"

    return Reply(parts(), kind="text/event-stream; charset=utf-8", whole=whole)


Handler = Callable[[Asked], Awaitable[Reply]]


class FakeServer:
    """Serves until it is left, killed or stopped; `start` brings it back at the same address."""

    def __init__(self, handler: Handler, tls: ssl.SSLContext | None = None) -> None:
        self.handler = handler
        self.asked: list[Asked] = []
        self._tls = tls
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10), "the fake server did not start"

    def kill(self) -> None:
        """Break off every connection and listen no more, as a process does that is killed."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        writers: set[asyncio.StreamWriter] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.add(writer)
            try:
                while await self._answer(reader, writer):
                    pass
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writers.discard(writer)
                writer.transport.abort()

        server = await asyncio.start_server(connected, "127.0.0.1", self.port, ssl=self._tls, reuse_address=True)
        ready.set()
        await self._stop.wait()
        server.close()
        for writer in writers:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False where the connection is to end."""
        first = await reader.readline()
        if not first:
            return False
        if not first.isascii():
            return False  # the beginning of a TLS handshake
        method, path, _ = first.decode().split(" ", 2)
        headers = {}
        while (line := (await reader.readline()).decode().strip()) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        asked = Asked(method, path, headers, body)
        self.asked.append(asked)
        reply = await self.handler(asked)
        head = {"content-type": reply.kind, **reply.headers}
        if isinstance(reply.parts, bytes):
            head["content-length"] = str(len(reply.parts))
        else:
            head["transfer-encoding"] = "chunked"
        lines = [f"HTTP/1.1 {reply.status} Fake", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        if isinstance(reply.parts, bytes):
            writer.write(reply.parts)
        else:
            async with aclosing(reply.parts) as parts:
                async for part in parts:
                    writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                    await writer.drain()
            if reply.whole:
                writer.write(b"0\r\n\r\n")
        await writer.drain()
        return reply.whole
