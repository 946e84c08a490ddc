"""One server over HTTP: what comes back, and what is said when something else does."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from gpa_codecs.errors import BackendError

pytest.importorskip("httpx", reason="needs httpx")

from gpa_engines.servers.http_server import (
    HttpServer,
    MalformedAnswer,
    MalformedStream,
    ServerAccess,
    ServerError,
    ServerLost,
    ServerRefused,
    ServerUnreachable,
    StalledStream,
)
from tests.servers.fake_http import Asked, FakeServer, Reply, events_reply, json_reply

KEY = "k3y-that-nobody-may-see"


async def collect(server: HttpServer, path: str = "/stream") -> list[Any]:
    async with aclosing(server.post_events(path, {})) as events:
        return [event async for event in events]


def ask(reply: Reply, *, path: str = "/stream", stream: bool = True, **access: Any) -> Any:
    """What a server that always answers `reply` is understood to say."""

    async def handler(asked: Asked) -> Reply:
        return reply

    async def main(url: str) -> Any:
        server = HttpServer(ServerAccess(url, **access))
        try:
            return await (collect(server, path) if stream else server.get_json(path))
        finally:
            await server.close()

    with FakeServer(handler) as fake:
        return asyncio.run(main(fake.url))


def test_json_and_events_arrive_and_the_key_is_sent() -> None:
    async def handler(asked: Asked) -> Reply:
        assert asked.headers["authorization"] == f"Bearer {KEY}"
        return events_reply(*asked.json) if asked.method == "POST" else json_reply({"path": asked.path})

    async def main(url: str) -> None:
        server = HttpServer(ServerAccess(f"{url}/v1/", KEY))
        assert server.url == url
        assert await server.get_json("/a") == {"path": "/a"}
        async with aclosing(server.post_events("/b", [1, {"x": "\u2028"}])) as events:
            assert [event async for event in events] == [1, {"x": "\u2028"}]
        await server.close()

    with FakeServer(handler) as fake:
        asyncio.run(main(fake.url))
        # Another loop, other connections, the same object.
        asyncio.run(main(fake.url))


def test_closing_the_events_drops_the_connection() -> None:
    ended: list[float] = []

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: 1\n\n"
                await asyncio.sleep(0.01)
        finally:
            ended.append(time.monotonic())

    async def handler(asked: Asked) -> Reply:
        return Reply(endless(), kind="text/event-stream")

    async def main(url: str) -> None:
        server = HttpServer(ServerAccess(url))
        async with aclosing(server.post_events("/", {})) as events:
            assert await anext(events) == 1
        for _ in range(200):
            if ended:
                break
            await asyncio.sleep(0.02)
        assert ended, "the server went on"
        await server.close()

    with FakeServer(handler) as fake:
        asyncio.run(main(fake.url))


def test_closing_the_server_ends_what_waits() -> None:
    async def endless() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        await asyncio.sleep(60)

    async def handler(asked: Asked) -> Reply:
        return Reply(endless(), kind="text/event-stream")

    async def main(url: str) -> None:
        server = HttpServer(ServerAccess(url))
        waiting = asyncio.create_task(collect(server))
        await asyncio.sleep(0.3)
        await server.close()
        with pytest.raises(ServerError):
            await asyncio.wait_for(waiting, 5)

    with FakeServer(handler) as fake:
        asyncio.run(main(fake.url))


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (Reply(b"<html>Hello</html>", kind="text/html"), MalformedStream, "answered with text/html .*<html>Hello"),
        (json_reply({"choices": []}), MalformedStream, "answered with application/json where a stream"),
        (events_reply({"a": 1}, b"{oops", done=False), MalformedStream, "event 1: not JSON: {oops"),
        (events_reply(1, 2, done=False), ServerLost, r"ended its answer after event 2, without \[DONE\]"),
        (events_reply(1, done=False, whole=False), ServerLost, "broke off its answer"),
        (
            Reply(b"not gzip", kind="text/event-stream", headers={"content-encoding": "gzip"}),
            MalformedAnswer,
            "decoded",
        ),
        (json_reply({"error": {"message": "no such"}}, 404), ServerRefused, "refused with status 404: no such"),
        (json_reply({"error": "Unauthorized"}, 401), ServerRefused, "401: Unauthorized: the server asks for a key"),
        (json_reply({"detail": [{"msg": "wrong"}]}, 422), ServerRefused, "422: .*wrong"),
        (Reply(b"", 503, kind="text/plain"), ServerRefused, "refused with status 503$"),
        (Reply(status=308, headers={"location": "https://x/"}), ServerRefused, "it points to https://x/"),
    ],
)
def test_what_is_no_stream_of_events_is_said(reply: Reply, error: type[ServerError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        ask(reply)
    assert type(caught.value) is error
    assert "http://127.0.0.1:" in str(caught.value)


def test_what_is_not_json_is_said() -> None:
    with pytest.raises(MalformedAnswer, match="/v1/models answered with something that is not JSON: <h1>It works"):
        ask(Reply(b"<h1>It works!</h1>", kind="text/html"), path="/v1/models", stream=False)


async def _silence(first: bytes = b"") -> AsyncGenerator[bytes, None]:
    if first:
        yield first
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (b"", "nothing came for 0.2 s before the answer began: .*or raise start_timeout"),
        (b"data: 1\n\n", "nothing came for 0.3 s in the middle of an answer: .*or raise stall_timeout"),
    ],
)
def test_a_stalled_stream_is_given_up(first: bytes, message: str) -> None:
    reply = Reply(_silence(first), kind="text/event-stream")
    with pytest.raises(StalledStream, match=message):
        ask(reply, start_timeout=0.2, stall_timeout=0.3)


def test_a_short_question_is_given_up_sooner() -> None:
    with pytest.raises(StalledStream, match=r"has not answered within 0.2 s"):
        ask(Reply(_silence(), kind="application/json"), stream=False, connect_timeout=0.2)


def test_comments_keep_a_stream_alive() -> None:
    async def slow() -> AsyncGenerator[bytes, None]:
        for _ in range(6):
            yield b": ping\n\n"
            await asyncio.sleep(0.15)
        yield b"data: 5\n\ndata: [DONE]\n\n"

    assert ask(Reply(slow(), kind="text/event-stream"), start_timeout=0.4, stall_timeout=0.4) == [5]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9", "cannot be reached: .*is the server running"),
        ("http://nowhere.invalid", "cannot be reached: .*is the server running"),
    ],
)
def test_a_server_that_is_not_there(url: str, message: str) -> None:
    with pytest.raises(ServerUnreachable, match=message):
        asyncio.run(HttpServer(ServerAccess(url)).get_json("/"))


def test_the_key_is_in_no_message_and_no_repr() -> None:
    access = ServerAccess("http://127.0.0.1:9", KEY)
    assert KEY not in repr(access) + repr(HttpServer(access)) + str(access)
    for reply in (
        json_reply({"error": {"message": f"invalid key {KEY}"}}, 401),
        Reply(f"<p>{KEY}</p>".encode(), kind="text/html"),
        events_reply(f"broken {KEY}".encode()),
    ):
        with pytest.raises(ServerError) as caught:
            ask(reply, key=KEY)
        assert KEY not in str(caught.value)
        assert "***" in str(caught.value)
    with pytest.raises(ServerRefused, match="the key that was sent is not the server's; set GPA_REMOTE_KEY"):
        ask(json_reply({}, 401), key=KEY)


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ({"url": "ftp://a"}, "url is 'ftp://a'; expected one such as http://host:8000"),
        ({"url": "host:8000"}, "expected one such as"),
        ({"url": "http://"}, "expected one such as"),
        ({"url": "http://a:99999"}, "url cannot be read"),
        ({"url": "http://a/?x=1"}, r"without \? and #"),
        ({"url": 7}, "url is 7"),
        ({"url": "http://user:secret@a"}, "^the url of a holds a user or a password"),
        ({"url": "http://a", "key": ""}, "the server's key is empty"),
        ({"url": "http://a", "key": "a\nb"}, "characters that no HTTP header can"),
        ({"url": "http://a", "verify": "/nowhere.pem"}, "ca_file /nowhere.pem: there is no such file"),
        ({"url": "http://a", "stall_timeout": 0}, "stall_timeout is 0; expected seconds, more than 0"),
        ({"url": "http://a", "connect_timeout": "1"}, "connect_timeout is '1'"),
    ],
)
def test_what_cannot_be_an_address_is_refused(access: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        ServerAccess(**access)
    assert "secret" not in str(caught.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for 127.0.0.1 that it signed itself, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    out = folder / "both.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key"), "-out", str(folder / "cert")),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no certificate can be made here: {error}")
    out.write_bytes((folder / "key").read_bytes() + (folder / "cert").read_bytes())
    return out


def test_certificates_are_checked_unless_told_otherwise(certificate: Path, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    async def handler(asked: Asked) -> Reply:
        return json_reply({"tls": True})

    async def fetch(url: str, verify: bool | str) -> Any:
        server = HttpServer(ServerAccess(url, verify=verify))
        try:
            return await server.get_json("/")
        finally:
            await server.close()

    with FakeServer(handler, tls=context) as fake:
        with pytest.raises(ServerUnreachable, match=r"its certificate is not trusted .* name the authority .* ca_file"):
            asyncio.run(fetch(fake.url, True))
        assert asyncio.run(fetch(fake.url, str(certificate))) == {"tls": True}
        assert asyncio.run(fetch(fake.url, False)) == {"tls": True}
    with FakeServer(handler) as plain, pytest.raises(ServerUnreachable, match=r"no TLS connection .* begins http://"):
        asyncio.run(fetch(plain.url.replace("http:", "https:"), True))
    nonsense = tmp_path / "ca.pem"
    nonsense.write_text("no certificate")
    with pytest.raises(BackendError, match="no certificates in PEM format can be read"):
        HttpServer(ServerAccess("https://a", verify=str(nonsense)))


def test_httpx_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import gpa_engines, gpa_engines.backends.remote, gpa_engines.cli.run, sys; assert 'httpx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
