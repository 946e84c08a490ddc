"""The parent's side of an engine in a process of its own: an Engine that survives whatever the other one does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import RequestError
from gpa_conformance import wire
from gpa_conformance.target import Target
from gpa_engines.engine import EngineInfo, GenerationRequest, TokenDelta

CLOSE_PATIENCE = 10.0
"""Seconds that the engine gets to free its model before its process is killed."""

LAST_LINES = 4
"""Lines of standard error that go into the reason when the process dies."""

LONGEST_LINE = 300


class EngineDied(Exception):
    """The engine's process ended by itself. The message says how: exit code or signal, and what it printed last."""


class ChildEngine:
    """An :class:`~gpa_engines.engine.Engine` whose calls are done by a child process; made by :meth:`start`.

    Errors of the engine keep their GpaError type and message. Once the process is dead every call raises EngineDied.
    The child has a session of its own: Ctrl-C reaches the parent alone, which then ends it.
    """

    @classmethod
    async def start(cls, target: Target) -> ChildEngine:
        """Start a process and load the engine in it. Raises as `Target.open`, and EngineDied."""
        folder = tempfile.TemporaryDirectory(prefix="gpa-conformance-")
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gpa_conformance.child"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                start_new_session=True,
            )
        except BaseException:
            folder.cleanup()
            errors.close()
            raise
        engine = cls(process, folder, errors)
        try:
            opening = engine._expect(0)
            engine._write(
                {
                    "parent": os.getpid(),
                    "sys_path": [path or os.getcwd() for path in sys.path],
                    "folder": folder.name,
                    "target": asdict(target) | {"model_dir": str(target.model_dir), "options": dict(target.options)},
                }
            )
            engine._info = wire.info_from_wire((await engine._receive(opening))["info"])
        except BaseException:
            await engine.kill()
            raise
        return engine

    def __init__(
        self, process: asyncio.subprocess.Process, folder: tempfile.TemporaryDirectory[str], errors: Any
    ) -> None:
        self._process = process
        self._folder = folder
        self._errors = errors
        self._info: EngineInfo | None = None
        self._last = 0
        self._open: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._death: str | None = None
        self._closed = False
        self._finished = False
        self._group_killed = False
        self._reader = asyncio.create_task(self._read())

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None
        return self._info

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether calls can be answered."""
        return self._death is None and not self._closed

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See :meth:`gpa_engines.engine.Engine.generate`; closing waits until the engine has let go of the request."""
        number, messages = self._call("generate", request=wire.request_to_wire(request))
        finished = False
        try:
            while not finished:
                try:
                    message = await self._receive(messages)
                except asyncio.CancelledError:
                    raise
                except Exception:
                    finished = True
                    raise
                finished = "done" in message
                if not finished:
                    yield wire.delta_from_wire(message["delta"])
        finally:
            if not finished and self.alive:
                await self._stop(number, messages)
            self._open.pop(number, None)

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """See :meth:`gpa_engines.engine.Engine.logits`; the array is a read-only mapping of a deleted file."""
        return await self._logits(ids, None)

    async def logits_at(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """The rows of :meth:`logits` at some positions; only they leave the child."""
        return await self._logits(ids, [int(position) for position in positions])

    async def _logits(self, ids: Sequence[int], positions: Sequence[int] | None) -> NDArray[np.float32]:
        number, messages = self._call("logits", ids=[int(token) for token in ids], positions=positions)
        try:
            message = await self._receive(messages)
        finally:
            self._open.pop(number, None)
        path = Path(self._folder.name) / message["file"]
        logits = np.load(path, mmap_mode="r", allow_pickle=False)
        with contextlib.suppress(OSError):  # Windows keeps a mapped file; it goes with the folder
            path.unlink()
        return logits

    async def close(self) -> None:
        """Close the engine and end its process, by force if it does not end by itself. Closing twice is harmless."""
        if self._closed:
            self._finished = True
            return
        try:
            if self._death is None:
                number, messages = self._call("close")
                async with asyncio.timeout(CLOSE_PATIENCE):
                    await self._receive(messages)
                self._open.pop(number, None)
        except (TimeoutError, EngineDied):
            pass
        finally:
            self._finished = True
            await self.kill(patience=CLOSE_PATIENCE if self._death is None else 0)

    async def kill(self, patience: float = 0) -> None:
        """End the process and what it started; with `patience` it gets so many seconds to end by itself."""
        self._closed = True
        if self._process.stdin is not None:
            self._process.stdin.close()
        if patience:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._process.wait()
        self._kill_group()
        await self._process.wait()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._folder.cleanup()
        self._errors.close()

    def printed(self) -> list[str]:
        """The last lines that the engine's process has written to standard error."""
        if self._errors.closed:
            return []
        size = os.fstat(self._errors.fileno()).st_size
        tail = os.pread(self._errors.fileno(), 1 << 16, max(0, size - (1 << 16))) if hasattr(os, "pread") else b""
        lines = [line.strip()[-LONGEST_LINE:] for line in tail.decode("utf-8", "replace").splitlines()]
        return [line for line in lines if line][-LAST_LINES:]

    def _call(self, call: str, **arguments: Any) -> tuple[int, asyncio.Queue[dict[str, Any]]]:
        if self._finished:
            raise RequestError("the engine is closed; create a new one")
        if self._death is not None or self._closed:
            raise EngineDied(self._death or "the engine's process was ended")
        self._last += 1
        messages = self._expect(self._last)
        self._write({"id": self._last, "call": call, **arguments})
        return self._last, messages

    def _expect(self, number: int) -> asyncio.Queue[dict[str, Any]]:
        return self._open.setdefault(number, asyncio.Queue())

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the reader finds out that the process is dead, and how it died
            self._process.stdin.write(wire.pack(message))

    async def _receive(self, messages: asyncio.Queue[dict[str, Any]]) -> dict[str, Any]:
        message = await messages.get()
        if "death" in message:
            raise EngineDied(message["death"])
        if "error" in message:
            raise wire.error_from_wire(message["error"])
        return message

    async def _stop(self, number: int, messages: asyncio.Queue[dict[str, Any]]) -> None:
        """Let the child close a request and wait until it has."""
        self._write({"id": number, "call": "stop"})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_PATIENCE):
                while {"done", "error", "death"}.isdisjoint(await messages.get()):
                    pass

    async def _read(self) -> None:
        assert self._process.stdout is not None
        answers = self._process.stdout
        try:
            while True:
                length = int.from_bytes(await answers.readexactly(wire.LENGTH), "little")
                message = wire.unpack(await answers.readexactly(length))
                if message["id"] in self._open:
                    self._open[message["id"]].put_nowait(message)
        except (asyncio.IncompleteReadError, OSError):
            self._kill_group()
            self._death = self._describe(await self._process.wait())
        for messages in self._open.values():
            messages.put_nowait({"death": self._death})

    def _describe(self, status: int) -> str:
        if self._closed:
            return "the engine's process was ended"
        how = f"ended with exit code {status}"
        if status < 0:
            with contextlib.suppress(ValueError):
                how = f"was killed by {signal.Signals(-status).name}"
        printed = self.printed()
        said = f"; it last printed: {' | '.join(printed)}" if printed else " and printed nothing"
        return f"the engine's process {how}{said}"

    def _kill_group(self) -> None:
        """Once: later the group's number may be another's."""
        if self._group_killed:
            return
        self._group_killed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
