"""One HTTP server as an engine needs it: JSON there and back, streams of events, and errors that say what to do.

The bearer key is sent to the server and appears nowhere else: not in a repr, not in a message, not in what a server's
own error message says. Redirects are not followed, so that it cannot be carried elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx

from gpa_codecs.errors import BackendError, RequestError
from gpa_engines.servers.event_stream import EventParser, EventTooLong
from gpa_engines.servers.key import KEY_REMEDY

KEPT_ALIVE = 2.0
"""Seconds that an idle connection is kept. Servers on uvicorn end theirs after 5: a request on one that is just ending
would look like a server that died."""

HEALTH = "/health"
"""Answered with 200 by vLLM and SGLang as long as they can generate."""

SHOWN = 300
"""Characters of a server's own words that a message repeats."""

Limit = Literal["start_timeout", "stall_timeout"]

T = TypeVar("T")


class ServerError(RequestError):
    """A server that did not do what it was asked; the message names it."""


class ServerUnreachable(ServerError):
    """No connection, or none that the server's certificate allows."""


class ServerRefused(ServerError):
    """An HTTP status other than 200. status: that. detail: what the server said, "" for nothing."""

    def __init__(self, message: str, status: int, detail: str) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail


class ServerLost(ServerError):
    """A connection that ended in the middle of an answer: the server died, or something between."""


class MalformedAnswer(ServerError):
    """An answer that is not what such a server sends."""


class MalformedStream(MalformedAnswer):
    """An event that is not what such a server sends."""


class StalledStream(ServerError):
    """Nothing came for longer than the timeout."""


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """Where a server is and how to talk to it; times in seconds.

    url: http or https, with a path where a proxy adds one; an ending "/v1" is dropped. key: sent as
    `Authorization: Bearer`. verify: whether the certificate is checked, or the path of a file with the authorities
    that are trusted in place of the system's. connect_timeout: until connected, and for short questions.
    start_timeout: until the first byte of an answer, which a busy server owes to those before. stall_timeout: from
    then on between bytes. Raises BackendError for a value that cannot be used.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    verify: bool | str = True
    connect_timeout: float = 10.0
    start_timeout: float = 300.0
    stall_timeout: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _checked_url(self.url))
        if self.key is not None and not (self.key and self.key.isascii() and self.key.isprintable()):
            raise BackendError(f"the server's key is empty or holds characters that no HTTP header can: {KEY_REMEDY}")
        if isinstance(self.verify, str) and not Path(self.verify).is_file():
            raise BackendError(f"ca_file {self.verify}: there is no such file; expected certificates in PEM format")
        for name in ("connect_timeout", "start_timeout", "stall_timeout"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise BackendError(f"{name} is {value!r}; expected seconds, more than 0")


class HttpServer:
    """Requests to one server. Connections belong to an event loop; another loop gets connections of its own."""

    def __init__(self, access: ServerAccess) -> None:
        """Raises BackendError for a file of certificates that is none."""
        self.access = access
        self._context = _ssl_context(access.verify)
        self._client: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"HttpServer({self.access.url!r})"

    @property
    def url(self) -> str:
        return self.access.url

    async def get_text(self, path: str, *, timeout: float | None = None) -> str:
        """The body of `path`. timeout: for the whole of it, None is `connect_timeout`. Raises ServerError."""
        return (await self._whole("GET", path, None, timeout or self.access.connect_timeout)).decode(errors="replace")

    async def get_json(self, path: str, *, timeout: float | None = None) -> Any:
        """The JSON at `path`; as :meth:`get_text`."""
        body = await self._whole("GET", path, None, timeout or self.access.connect_timeout)
        return self._parsed(path, body)

    async def post_json(self, path: str, body: Any) -> Any:
        """The JSON that the server answers to `body`. Raises ServerError."""
        return self._parsed(path, await self._whole("POST", path, body, None))

    async def post_text(self, path: str, body: Any) -> str:
        """What the server answers to `body`. Raises ServerError."""
        return (await self._whole("POST", path, body, None)).decode(errors="replace")

    async def post_events(self, path: str, body: Any) -> AsyncGenerator[Any, None]:
        """Data of the events that the server streams, parsed as JSON, up to `[DONE]`.

        Closing the generator drops the connection, which tells the server to stop. Raises ServerError: StalledStream
        where nothing comes, ServerLost where the stream ends without `[DONE]`, MalformedStream for anything else that
        is not such an event.
        """
        events = 0
        parser = EventParser()
        async with self._answer("POST", path, body) as response:
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                beginning = await self._beginning(response)
                raise MalformedStream(
                    f"{self.url}{path} answered with {kind or 'no content type'} where a stream of events was expected"
                    f"{_quoted(self._scrubbed(beginning))}"
                )
            async with aclosing(self._chunks(response, path)) as chunks:
                async for chunk in chunks:
                    try:
                        for data in parser.feed(chunk):
                            if data.strip() == b"[DONE]":
                                return
                            yield self._event(path, data, events)
                            events += 1
                    except EventTooLong as error:
                        raise MalformedStream(f"{self.url}{path}, event {events}: {error}") from error
        where = "inside" if parser.pending else "after"
        raise ServerLost(f"{self.url} ended its answer {where} event {events}, without [DONE]: it died or was stopped")

    async def close(self) -> None:
        """Close the connections; what is waiting for an answer gets a ServerError. New requests open new ones."""
        client, loop = self._client, self._loop
        self._client = self._loop = None
        if client is not None and loop is asyncio.get_running_loop():
            await client.aclose()

    def _here(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            # Connections of a loop that is gone cannot be closed any more, only forgotten.
            headers = {} if self.access.key is None else {"Authorization": f"Bearer {self.access.key}"}
            self._client = httpx.AsyncClient(
                headers=headers,
                verify=self._context,
                # Every wait has a limit of its own below, of which there are more than httpx has.
                timeout=httpx.Timeout(None, connect=self.access.connect_timeout),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=KEPT_ALIVE),
                follow_redirects=False,
            )
            self._loop = loop
        return self._client

    @asynccontextmanager
    async def _answer(self, method: str, path: str, body: Any) -> AsyncIterator[httpx.Response]:
        """The answer's head, its status checked; leaving the context drops the connection unless it was read."""
        try:
            client = self._here()
            content = None if body is None else json.dumps(body).encode()
            headers = {} if body is None else {"Content-Type": "application/json"}
            request = client.build_request(method, self.url + path, content=content, headers=headers)
            response = await self._awaited(client.send(request, stream=True), path, "start_timeout", method == "POST")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise ServerUnreachable(self._unreachable(error)) from None
        except httpx.HTTPError as error:
            raise ServerLost(f"{self.url} broke off the connection before it answered: {_words(error)}") from None
        try:
            if response.status_code != 200:
                raise self._refusal(path, response, await self._beginning(response))
            yield response
        finally:
            await response.aclose()

    async def _whole(self, method: str, path: str, body: Any, timeout: float | None) -> bytes:
        """The whole body. timeout: for all of it; None leaves it to the timeouts of its parts."""
        try:
            async with (
                asyncio.timeout(timeout),
                self._answer(method, path, body) as response,
                aclosing(self._chunks(response, path)) as chunks,
            ):
                return b"".join([chunk async for chunk in chunks])
        except TimeoutError:
            raise StalledStream(f"{self.url}{path} has not answered within {timeout:g} s: the server hangs") from None

    async def _chunks(self, response: httpx.Response, path: str) -> AsyncGenerator[bytes, None]:
        """The body as it arrives. Raises ServerLost, StalledStream, MalformedAnswer."""
        chunks = response.aiter_bytes()
        limit: Limit = "start_timeout"
        posted = response.request.method == "POST"
        while True:
            try:
                chunk = await self._awaited(anext(chunks, None), path, limit, posted)
            except httpx.DecodingError as error:
                raise MalformedAnswer(f"{self.url}{path}: the answer cannot be decoded: {_words(error)}") from None
            except httpx.HTTPError as error:
                raise ServerLost(f"{self.url} broke off its answer: {_words(error)}; it died or was stopped") from None
            if chunk is None:
                return
            limit = "stall_timeout"
            yield chunk

    async def _awaited(self, step: Awaitable[T], path: str, limit: Limit, posted: bool) -> T:
        """What a step of a request gives. Raises StalledStream where it takes longer than the limit.

        A server that is shutting down may keep a stream open and send nothing more (vLLM does, on SIGTERM). So a silent
        one is asked for its health now and then, and ServerLost raised where it has none; one that is only slow to
        answer that is waited for. `posted`: only an answer takes that long, no short question.
        """
        task = asyncio.ensure_future(step)
        begun = asyncio.get_running_loop().time()
        try:
            while True:
                left = begun + getattr(self.access, limit) - asyncio.get_running_loop().time()
                if left <= 0:
                    raise self._stalled(path, limit)
                await asyncio.wait({task}, timeout=min(left, self.access.connect_timeout) if posted else left)
                if task.done():
                    return task.result()
                if posted and left > self.access.connect_timeout:
                    await self._check_health()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _check_health(self) -> None:
        """Raise ServerLost for a server that is not there or says that it is ill."""
        try:
            await self.get_text(HEALTH)
        except StalledStream:
            return
        except ServerError as error:
            if isinstance(error, ServerRefused) and error.status < 500:
                return  # it has no such page
            raise ServerLost(f"{self.url} has stopped in the middle of an answer: {error}") from None

    async def _beginning(self, response: httpx.Response) -> str:
        """The first words of a body that was not asked for, "" where it cannot be read."""
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self.access.connect_timeout):
                async for chunk in response.aiter_bytes():
                    parts.append(chunk)
                    if sum(map(len, parts)) > 16384:
                        break
        except (httpx.HTTPError, TimeoutError):
            pass
        return b"".join(parts).decode(errors="replace")

    def _refusal(self, path: str, response: httpx.Response, body: str) -> ServerRefused:
        status = response.status_code
        detail = self._scrubbed(_detail(body))
        where = f"{self.url}{path} refused with status {status}{_quoted(detail)}"
        if status in (401, 403):
            sent = "the key that was sent is not the server's" if self.access.key else "the server asks for a key"
            return ServerRefused(f"{where}: {sent}; {KEY_REMEDY}", status, detail)
        if 300 <= status < 400:
            target = response.headers.get("location", "elsewhere")
            return ServerRefused(f"{where}: it points to {target}; give that as the url if it is right", status, detail)
        return ServerRefused(where, status, detail)

    def _stalled(self, path: str, limit: Limit) -> StalledStream:
        when = "before the answer began" if limit == "start_timeout" else "in the middle of an answer"
        return StalledStream(
            f"{self.url}{path}: nothing came for {getattr(self.access, limit):g} s {when}: the server hangs, or has "
            f"more to do than it can; look at its log, or raise {limit}"
        )

    def _unreachable(self, error: httpx.TransportError) -> str:
        if isinstance(error, httpx.ConnectTimeout):
            return f"{self.url} cannot be reached: no connection in {self.access.connect_timeout:g} s; {_START}"
        words = _words(error)
        if "CERTIFICATE_VERIFY_FAILED" in words:
            return (
                f"{self.url}: its certificate is not trusted ({words}); name the authority that signed it with "
                "ca_file, or, where nobody can listen, switch the check off with verify=false"
            )
        if self.url.startswith("https") and not str(error):
            words = "the server ended the handshake"
        if "SSL" in words or "handshake" in words:
            return f"{self.url}: no TLS connection ({words}); if the server has no certificate, its url begins http://"
        return f"{self.url} cannot be reached: {words}; {_START}"

    def _parsed(self, path: str, body: bytes) -> Any:
        try:
            return json.loads(body)
        except ValueError:
            shown = self._scrubbed(body[:4096].decode(errors="replace"))
            raise MalformedAnswer(
                f"{self.url}{path} answered with something that is not JSON{_quoted(shown)}"
            ) from None

    def _event(self, path: str, data: bytes, number: int) -> Any:
        try:
            return json.loads(data)
        except ValueError:
            shown = self._scrubbed(data[:4096].decode(errors="replace"))
            raise MalformedStream(f"{self.url}{path}, event {number}: not JSON{_quoted(shown)}") from None

    def _scrubbed(self, text: str) -> str:
        return text.replace(self.access.key, "***") if self.access.key else text


_START = "is the server running, and is it the right host and port?"


def _checked_url(url: object) -> str:
    expected = "expected one such as http://host:8000"
    if not isinstance(url, str):
        raise BackendError(f"url is {url!r}; {expected}")
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise BackendError(f"url cannot be read ({error}); {expected}") from None
    if parts.username or parts.password:
        raise BackendError(f"the url of {host} holds a user or a password; leave them out, {KEY_REMEDY}")
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.strip().isprintable():
        raise BackendError(f"url is {url!r}; {expected}")
    if parts.query or parts.fragment:
        raise BackendError(f"url is {url!r}; {expected}, without ? and #")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1').rstrip('/')}"


def _ssl_context(verify: bool | str) -> ssl.SSLContext | bool:
    if not isinstance(verify, str):
        return verify
    try:
        return ssl.create_default_context(cafile=verify)
    except (OSError, ssl.SSLError) as error:
        raise BackendError(f"ca_file {verify}: no certificates in PEM format can be read from it ({error})") from error


def _detail(body: str) -> str:
    """What an error's body says: of the shapes that vLLM, SGLang and FastAPI send, else its own text."""
    try:
        value = json.loads(body)
    except ValueError:
        return body
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return value if isinstance(value, str) else json.dumps(value)


def _quoted(words: str) -> str:
    words = " ".join(words.split())
    return f": {words if len(words) <= SHOWN else words[: SHOWN - 3] + '...'}" if words else ""


def _words(error: BaseException) -> str:
    """What the system said, where it is the cause of what the HTTP client says."""
    words = str(error) or type(error).__name__
    cause = error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror and not isinstance(cause, ssl.SSLError):
            words = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return words
