"""The process that SGLang's engine lives in: `python -m gpa_engines.backends.sglang.worker FD`, started by `process`.

SGLang is not a guest that one wants in one's own process: when one of its workers dies, it ends the process that
started it, an id out of range is enough for that; closing it ends every child of that process, whosever they are; it
takes over the signal handlers, and belongs to the event loop that it was first used in. Here it may.

FD is one end of a socket pair. The other side's end of it, however it comes about, ends this process and all of
SGLang's.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

GRACE = 10.0
"""Seconds that SGLang may take to end by itself once nobody needs it any more."""


def main() -> int:
    """Start SGLang, serve until told to stop or until the other side is gone, and take SGLang along."""
    connection = Connection(int(sys.argv[1]))
    arguments: dict[str, Any] = connection.recv()
    inbox = _Inbox(connection)
    try:
        engine = start(arguments)
        info = json.loads(json.dumps(engine.get_server_info(), default=str))
    except Exception as error:
        connection.send(("failed", type(error).__name__, str(error)))
        return 1
    connection.send(("ready", info))
    try:
        engine.loop.run_until_complete(_Service(engine, connection).run(inbox))
    finally:
        threading.Timer(GRACE, _end_all).start()
        engine.shutdown()
        _end_all()
    return 0


def start(arguments: dict[str, Any]) -> Any:
    """`sglang.Engine` with these ServerArgs; "auto" values are decided here, where torch is at hand."""
    if arguments["device"] == "cpu":
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    # By name, since this package has the name too, which confuses type checkers.
    sglang = import_module("sglang")
    known = field_names(import_module("sglang.srt.server_args").ServerArgs)
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"engine_args has {', '.join(unknown)}, which SGLang {sglang.__version__} does not know")
    if arguments["device"] in ("auto", "cuda"):
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device")
        arguments["device"] = "cuda"
    return sglang.Engine(**arguments)


def field_names(server_args: type) -> tuple[str, ...]:
    """Names that SGLang's ServerArgs takes; it is a msgspec struct now and was a dataclass."""
    fields = getattr(server_args, "__struct_fields__", None) or getattr(server_args, "__dataclass_fields__", ())
    return tuple(name for name in fields if not name.startswith("_"))


class _Inbox:
    """Reads messages on a thread of its own, from the start: only so is the other side's death seen while loading."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queue: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        self._early: list[tuple[Any, ...]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._read, name="gpa-sglang-inbox", daemon=True).start()

    async def receive(self) -> tuple[Any, ...]:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
                for message in self._early:
                    self._queue.put_nowait(message)
        return await self._queue.get()

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                message = ("close",)
            with self._lock:
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(self._queue.put_nowait, message)
                elif message[0] == "close":
                    _end_all()
                else:
                    self._early.append(message)
            if message[0] == "close":
                return


class _Service:
    """Answers ("stream", key, body), ("ask", key, body) and ("abort", key, rid); ("close",) ends it."""

    def __init__(self, engine: Any, connection: Connection) -> None:
        self._engine = engine
        self._connection = connection
        self._tasks: set[asyncio.Task[None]] = set()
        self._aborted: set[int] = set()

    async def run(self, inbox: _Inbox) -> None:
        while True:
            kind, *content = await inbox.receive()
            if kind == "close":
                return
            if kind == "abort":
                key, rid = content
                self._aborted.add(key)
                self._engine.tokenizer_manager.abort_request(rid=rid)
            else:
                task = asyncio.create_task(self._answer(kind, *content))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _answer(self, kind: str, key: int, body: dict[str, Any]) -> None:
        try:
            if key not in self._aborted:
                await (self._stream(key, body) if kind == "stream" else self._ask(key, body))
            self._send("end", key)
        except Exception as error:
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._send("error", key, f"{name}{error}")
        finally:
            self._aborted.discard(key)

    async def _stream(self, key: int, body: dict[str, Any]) -> None:
        known = 0
        async for chunk in await self._engine.async_generate(**body):
            if key in self._aborted:
                # What was aborted before SGLang had heard of it runs; what it has heard of is not told twice.
                self._engine.tokenizer_manager.abort_request(rid=body["rid"])
                continue
            total = chunk["meta_info"]["completion_tokens"]
            # All ids so far, in a list that goes on growing: only the new ones travel.
            self._send("chunk", key, _lean(chunk, chunk["output_ids"][known:total]))
            known = total

    async def _ask(self, key: int, body: dict[str, Any]) -> None:
        answer = await self._engine.async_generate(**body)
        self._send("chunk", key, _lean(answer, answer["output_ids"]))

    def _send(self, *message: Any) -> None:
        with suppress(OSError):  # the other side is gone, which the inbox sees too
            self._connection.send(message)


def _lean(chunk: Mapping[str, Any], ids: list[int]) -> dict[str, Any]:
    """What is read of a chunk; rows of hidden states as arrays, which travel faster than lists."""
    import numpy as np

    meta = chunk["meta_info"]
    kept = {name: meta.get(name) for name in ("finish_reason", "completion_tokens", "prompt_tokens", "cached_tokens")}
    if "hidden_states" in meta:
        kept["hidden_states"] = [np.asarray(part, np.float32) for part in meta["hidden_states"]]
    return {"output_ids": list(ids), "meta_info": kept}


def _end_all() -> None:
    """End this process and all that it started, which are a process group of their own."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
