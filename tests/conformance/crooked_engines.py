"""Engines and factories that misbehave, for the tests of targets and of the process that holds them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_engines.engine import Engine, EngineInfo, GenerationRequest, TokenDelta
from gpa_engines.registry import create_engine

TRIGGER = 13
"""The prompt id at which the engines of this module do what they are made for."""


class Wrapper:
    """The torch engine, unchanged."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        if request.prompt_ids[0] == TRIGGER:
            await self.misbehave()
        inner = self.engine.generate(request)
        try:
            async for delta in inner:
                yield delta
        finally:
            await inner.aclose()

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        if list(ids)[:1] == [TRIGGER]:
            await self.misbehave()
        return await self.engine.logits(ids)

    async def close(self) -> None:
        await self.engine.close()

    async def misbehave(self) -> None:
        pass


def load(model_dir: Path, **options: Any) -> Engine:
    return create_engine("torch", model_dir, dtype=options.pop("dtype", "float32"), threads=1, **options)


def healthy(model_dir: Path, *, dtype: str = "float32") -> Engine:
    return Wrapper(load(model_dir, dtype=dtype))


async def healthy_later(model_dir: Path) -> Engine:
    await asyncio.sleep(0)
    return Wrapper(load(model_dir))


class Aborting(Wrapper):
    async def misbehave(self) -> None:
        print("assertion failed in the native library", file=sys.stderr, flush=True)
        os.abort()


class Exiting(Wrapper):
    async def misbehave(self) -> None:
        os._exit(7)


class Segfaulting(Wrapper):
    async def misbehave(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


class Hanging(Wrapper):
    """Blocks the event loop, as a native call that never returns does."""

    async def misbehave(self) -> None:
        time.sleep(1000)


class Waiting(Wrapper):
    """Never answers, but lets others go on."""

    async def misbehave(self) -> None:
        await asyncio.Event().wait()


class Raising(Wrapper):
    async def misbehave(self) -> None:
        raise ZeroDivisionError("the trigger was pulled")


class Chatty(Wrapper):
    """Prints to standard output, where the frames go."""

    async def misbehave(self) -> None:
        print("progress: 50 %")
        os.write(1, b"from native code\n")


def aborting(model_dir: Path) -> Engine:
    return Aborting(load(model_dir))


def exiting(model_dir: Path) -> Engine:
    return Exiting(load(model_dir))


def segfaulting(model_dir: Path) -> Engine:
    return Segfaulting(load(model_dir))


def hanging(model_dir: Path) -> Engine:
    return Hanging(load(model_dir))


def waiting(model_dir: Path) -> Engine:
    return Waiting(load(model_dir))


def raising(model_dir: Path) -> Engine:
    return Raising(load(model_dir))


def chatty(model_dir: Path) -> Engine:
    return Chatty(load(model_dir))


class AtOneId(Wrapper):
    """Misbehaves only where logits of a single id are asked for."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        async with aclosing(self.engine.generate(request)) as inner:
            async for delta in inner:
                yield delta

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        if len(ids) == 1:
            await self.misbehave()
        return await self.engine.logits(ids)


def aborting_at_one_id(model_dir: Path) -> Engine:
    return type("AbortingAtOneId", (AtOneId,), {"misbehave": Aborting.misbehave})(load(model_dir))


def hanging_at_one_id(model_dir: Path) -> Engine:
    return type("HangingAtOneId", (AtOneId,), {"misbehave": Hanging.misbehave})(load(model_dir))


def waiting_at_one_id(model_dir: Path) -> Engine:
    return type("WaitingAtOneId", (AtOneId,), {"misbehave": Waiting.misbehave})(load(model_dir))


def raising_at_one_id(model_dir: Path) -> Engine:
    return type("RaisingAtOneId", (AtOneId,), {"misbehave": Raising.misbehave})(load(model_dir))


class AlwaysExiting(Wrapper):
    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        os._exit(7)


def exiting_always(model_dir: Path) -> Engine:
    return AlwaysExiting(load(model_dir))


class StrangeDtype(Wrapper):
    @property
    def info(self) -> EngineInfo:
        return replace(self.engine.info, dtype="posit16")


def strange_dtype(model_dir: Path) -> Engine:
    return StrangeDtype(load(model_dir))


class Bare(Wrapper):
    """Says that it can do nothing but generate."""

    @property
    def info(self) -> EngineInfo:
        return replace(self.engine.info, capabilities=frozenset())


def bare(model_dir: Path) -> Engine:
    return Bare(load(model_dir))


class Padded(Wrapper):
    """Says that its vocabulary is larger than the checkpoint's."""

    @property
    def info(self) -> EngineInfo:
        info = self.engine.info
        return replace(info, vocab_size=info.vocab_size + 11)


def padded(model_dir: Path) -> Engine:
    return Padded(load(model_dir))


class YieldingLists(Wrapper):
    def generate(self, request: GenerationRequest) -> Any:
        async def stream() -> AsyncGenerator[Any, None]:
            yield [1, 2]

        return stream()


def yielding_lists(model_dir: Path) -> Engine:
    return YieldingLists(load(model_dir))


class NoLogits:
    info = None

    def generate(self, request: GenerationRequest) -> None: ...


def no_engine(model_dir: Path) -> NoLogits:
    return NoLogits()


def no_codec(bicodec_dir: Path, glm_dir: Path) -> NoLogits:
    return NoLogits()


def failing(model_dir: Path) -> Engine:
    raise OSError("the device is busy")


def aborting_at_load(model_dir: Path) -> Engine:
    print("cannot map the weights", file=sys.stderr, flush=True)
    os.abort()


def takes_nothing() -> None: ...


not_callable = 3
