"""SGLang in a process of its own, from the side of those who use it: see `worker` for why.

Any number of event loops may use one; a thread reads what the process sends and hands it to whoever waits for it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import gpa_codecs
import gpa_engines
from gpa_codecs.errors import BackendError, RequestError
from gpa_engines.scheduler import post_to
from gpa_engines.servers.sglang_stream import aborted

END_SECONDS = 30.0
"""That SGLang may take to end when it is closed, before it is ended."""

LAST_LINES = 4
LONGEST_LINE = 300

_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception)\b.*|.*\b(?:Killed|terminate called|exit code)\b.*")
_OF_NO_USE = ("[SCHEDULER]", "During handling of")


class SglangProcess:
    """A running SGLang engine, as a :class:`~gpa_engines.servers.sglang_engine.SglangTransport`."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Start it with these ServerArgs and wait until the model is loaded. Raises BackendError."""
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process prints)
        self._process, self._connection = _start(self._printed)
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue[tuple[Any, ...]]]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._ended = ""
        try:
            self._connection.send(dict(arguments))
            kind, *content = self._connection.recv()
        except (EOFError, OSError):
            kind, content = "failed", ["", self._explanation() or "its process ended and printed no error"]
        except BaseException:
            self._finalizer()
            raise
        if kind != "ready":
            self._finalizer()
            name, message = map(str, content)
            raise BackendError(f"SGLang did not start: {explain_start(name, message)}")
        self.server_info: Any = content[0]
        # The thread must not keep this object alive, whose finalizer ends the process and with it the thread.
        reader = threading.Thread(target=_read, args=(weakref.ref(self), self._connection), daemon=True)
        reader.name = "gpa-sglang-reader"
        reader.start()

    @property
    def pid(self) -> int:
        """Of the process, which leads the group of all that SGLang starts."""
        return self._process.pid

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """See :class:`~gpa_engines.servers.sglang_engine.SglangTransport`."""
        number, queue = self._send("stream", body)
        ended = False
        try:
            while True:
                kind, content = await queue.get()
                if kind == "chunk":
                    yield content
                    continue
                ended = True
                if kind == "end":
                    return
                raise aborted({"message": content, "code": 400}) if kind == "error" else RequestError(content)
        finally:
            self._forget(number, None if ended else body["rid"])

    async def ask(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """See :class:`~gpa_engines.servers.sglang_engine.SglangTransport`."""
        number, queue = self._send("ask", body)
        ended = False
        try:
            kind, content = await queue.get()
            ended = True
            if kind == "chunk":
                return content
            raise aborted({"message": content, "code": 400}) if kind == "error" else RequestError(content)
        finally:
            self._forget(number, None if ended else body["rid"])

    async def close(self) -> None:
        """End SGLang's processes; what runs gets a RequestError."""
        self._end_waiting("the engine was closed")
        with suppress(OSError):
            self._connection.send(("close",))
        await asyncio.to_thread(_end, self._process, END_SECONDS)
        self._finalizer.detach()

    def _send(self, kind: str, body: Mapping[str, Any]) -> tuple[int, asyncio.Queue[tuple[Any, ...]]]:
        queue: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        with self._lock:
            if self._ended:
                raise RequestError(self._ended)
            number = next(self._numbers)
            self._waiting[number] = (asyncio.get_running_loop(), queue)
            self._write(kind, number, dict(body))
        return number, queue

    def _forget(self, number: int, abort: str | None) -> None:
        with self._lock:
            if self._waiting.pop(number, None) is not None and abort is not None:
                self._write("abort", number, abort)

    def _write(self, *message: Any) -> None:
        with suppress(OSError):  # the process is gone; the reader tells everybody who waits
            self._connection.send(message)

    def _deliver(self, kind: str, number: int, content: Any) -> None:
        with self._lock:
            found = self._waiting.get(number)
        if found is not None:
            loop, queue = found
            post_to(loop, queue.put_nowait, (kind, content))

    def _lose(self) -> None:
        cause = self._explanation()
        self._end_waiting(f"SGLang's process ended{f' ({cause})' if cause else ''}; create a new engine")

    def _end_waiting(self, reason: str) -> None:
        with self._lock:
            self._ended = self._ended or reason
            waiting, self._waiting = self._waiting, {}
        for loop, queue in waiting.values():
            post_to(loop, queue.put_nowait, ("lost", self._ended))

    def _explanation(self) -> str:
        self._printed.seek(0)
        return explain(self._printed.read().decode(errors="replace"))


def explain(printed: str) -> str:
    """The last different lines that name an error."""
    lines = (line.strip()[:LONGEST_LINE] for line in printed.splitlines())
    errors = [line for line in lines if _ERROR.match(line) and not line.startswith(_OF_NO_USE)]
    return " | ".join([*dict.fromkeys(errors[::-1])][:LAST_LINES][::-1])


def explain_start(name: str, message: str) -> str:
    """What SGLang's own words of why it did not start mean, and what to do."""
    words = " ".join(message.split())[:1200]
    if "no CUDA device" in words:
        return (
            "torch sees no CUDA device; look at nvidia-smi and at the torch that is installed, or say device=cpu where "
            "SGLang's CPU recipe was followed (docs/backends.md)"
        )
    if "out of memory" in words.lower() or "Not enough memory" in words or "exit code: -9" in words:
        return f"{words}; lower mem_fraction or max_tokens_in_flight"
    if name in ("ImportError", "ModuleNotFoundError"):
        return f"a package that it needs is missing or does not fit: {words}; pip install 'gpa-engines[sglang]'"
    return words


def _start(printed: IO[bytes]) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    roots = [str(Path(package.__file__ or "").parents[1]) for package in (gpa_engines, gpa_codecs)]
    path = os.pathsep.join([*dict.fromkeys(roots), *filter(None, [os.environ.get("PYTHONPATH")])])
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpa_engines.backends.sglang.worker", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": path},
            # A group of its own: it can be ended as one, and a Ctrl-C in the terminal is ours to handle.
            start_new_session=True,
        )
        return process, Connection(ours.detach())


def _end(process: subprocess.Popen[bytes], patience: float = 0.0) -> None:
    """Wait for the process to end, then end what is left of its group."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(owner: weakref.ref[SglangProcess], connection: Connection) -> None:
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            message = None
        process = owner()
        if process is None:
            return
        if message is None:
            process._lose()
            return
        kind, number, *content = message
        process._deliver(kind, number, content[0] if content else None)
        del process
