"""The process that holds the engine under test, so that it may crash or hang without taking the suite along.

`python -m gpa_conformance.child` speaks the frames of :mod:`gpa_conformance.wire` on standard input and output; what
libraries print goes to standard error. Logits are handed over as .npy files. When standard input ends, the parent is
gone, and the process ends whatever it is doing.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpa_conformance import wire
from gpa_conformance.rows import rows_at

STOP_PATIENCE = 0.2
"""Seconds in which a request that is to stop may still reach its next delta, to be closed there; then it is cancelled.
"""


def main() -> None:
    answers = _private_stdout()
    first = _read(sys.stdin.buffer)
    if first is None:
        return
    _die_with(first["parent"])
    sys.path[:] = first["sys_path"]
    asyncio.run(_serve(first, answers))


async def _serve(first: dict[str, Any], answers: BinaryIO) -> None:
    server = Server(answers, Path(first["folder"]))
    await server.open(first["target"])
    messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        while (message := _read(sys.stdin.buffer)) is not None:
            loop.call_soon_threadsafe(messages.put_nowait, message)
        if not server.closed:
            _end_at_once()
        loop.call_soon_threadsafe(messages.put_nowait, None)

    threading.Thread(target=read, name="reader", daemon=True).start()
    while (message := await messages.get()) is not None:
        server.handle(message)


class Server:
    """Answers the parent's calls with the engine's results; each call is a task of its own."""

    def __init__(self, answers: BinaryIO, folder: Path) -> None:
        self.closed = False
        self._answers = answers
        self._folder = folder
        self._engine: Any = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._stopping: set[int] = set()

    async def open(self, target: dict[str, Any]) -> None:
        """Load the engine and send its info under the number 0, or why it could not be loaded."""
        from gpa_conformance.target import Target

        try:
            self._engine = await Target(**{**target, "model_dir": Path(target["model_dir"])}).open()
            self._send({"id": 0, "info": wire.info_to_wire(self._engine.info)})
        except Exception as error:
            self._send({"id": 0, "error": wire.error_to_wire(error)})

    def handle(self, message: dict[str, Any]) -> None:
        number, call = message["id"], message["call"]
        if call == "stop":
            self._stop(number)
            return
        calls: dict[str, Callable[..., Any]] = {
            "generate": self._generate,
            "logits": self._logits,
            "close": self._close,
        }
        task = asyncio.create_task(self._answer(number, calls[call], message))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._forget(number))

    async def _answer(self, number: int, call: Callable[..., Any], message: dict[str, Any]) -> None:
        try:
            await call(number, message)
        except asyncio.CancelledError:
            self._send({"id": number, "done": True})
        except Exception as error:
            self._send({"id": number, "error": wire.error_to_wire(error)})

    async def _generate(self, number: int, message: dict[str, Any]) -> None:
        request = wire.request_from_wire(message["request"])
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                self._send({"id": number, "delta": wire.delta_to_wire(delta)})
                if number in self._stopping:
                    break
        self._send({"id": number, "done": True})

    async def _logits(self, number: int, message: dict[str, Any]) -> None:
        ids, positions = message["ids"], message["positions"]
        if positions is None:
            logits = np.asarray(await self._engine.logits(ids))
        else:
            logits = await rows_at(self._engine, ids, positions)
        if logits.dtype == object:
            raise wire.EngineFault(f"logits gave {type(logits.flat[0]).__name__}; expected float32[T, V]")
        path = self._folder / f"logits-{number}.npy"
        try:
            await asyncio.to_thread(np.save, path, logits, allow_pickle=False)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._send({"id": number, "file": path.name})

    async def _close(self, number: int, _message: dict[str, Any]) -> None:
        await self._engine.close()
        self.closed = True
        self._send({"id": number, "done": True})

    def _stop(self, number: int) -> None:
        """Close the request at its next delta, as a caller that breaks off does; cancel it if none comes."""
        task = self._tasks.get(number)
        if task is not None:
            self._stopping.add(number)
            asyncio.get_running_loop().call_later(STOP_PATIENCE, task.cancel)

    def _forget(self, number: int) -> None:
        self._tasks.pop(number, None)
        self._stopping.discard(number)

    def _send(self, message: dict[str, Any]) -> None:
        self._answers.write(wire.pack(message))
        self._answers.flush()


def _private_stdout() -> BinaryIO:
    """The pipe to the parent, with descriptor 1 pointed at standard error so that no library's print gets into it."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None at the end."""
    length = stream.read(wire.LENGTH)
    if len(length) < wire.LENGTH:
        return None
    size = int.from_bytes(length, "little")
    body = stream.read(size)
    return wire.unpack(body) if len(body) == size else None


def _die_with(parent: int) -> None:
    """On Linux the kernel ends this process with its parent, also inside native code that never lets Python run."""
    if not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        _end_at_once()


def _end_at_once() -> None:
    """End this process and what it started."""
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main()
