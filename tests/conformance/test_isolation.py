"""An engine in a process of its own answers like one in this process, and its death is only its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from gpa_codecs.errors import BackendError, CapacityError, RequestError
from gpa_conformance.isolation import ChildEngine, EngineDied
from gpa_conformance.target import make_target
from gpa_conformance.wire import EngineFault
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams, TokenDelta
from tests.conformance.crooked_engines import TRIGGER, load

CROOKED = "tests.conformance.crooked_engines"


@asynccontextmanager
async def child(model_dir: Path, factory: str = "healthy") -> AsyncIterator[ChildEngine]:
    engine = await ChildEngine.start(make_target(model_dir, engine=f"{CROOKED}:{factory}", options={}))
    try:
        yield engine
    finally:
        await engine.kill()


def request(*prompt: int, new_tokens: int = 8, **sampling: float) -> GenerationRequest:
    return GenerationRequest(prompt, SamplingParams(max_new_tokens=new_tokens, **sampling))  # pyright: ignore


async def deltas(engine: Engine, wanted: GenerationRequest) -> list[TokenDelta]:
    async with aclosing(engine.generate(wanted)) as stream:
        return [delta async for delta in stream]


def test_a_child_answers_like_the_engine_itself(tiny_checkpoint: Path) -> None:
    requests = [request(n, n + 1, temperature=1.0, seed=n) for n in range(20, 26)]
    limited = GenerationRequest((5, 6), SamplingParams(max_new_tokens=5), (7,), (range(40, 60), range(90, 95)))

    async def ask(engine: Engine) -> tuple[list[list[tuple[int, ...]]], np.ndarray]:
        answers = await asyncio.gather(*(deltas(engine, each) for each in (*requests, limited)))
        for answer in answers:
            assert answer[-1].finish_reason is not None
            assert answer[-1].usage is not None
        return [[delta.ids for delta in answer] for answer in answers], np.array(await engine.logits([3, 1, 2]))

    async def compare() -> None:
        engine = load(tiny_checkpoint)
        async with child(tiny_checkpoint) as isolated:
            assert isinstance(isolated, Engine)
            assert isolated.info == engine.info
            expected, found = await ask(engine), await ask(isolated)
        await engine.close()
        assert found[0] == expected[0]
        assert np.array_equal(found[1], expected[1])
        assert found[1].dtype == np.float32

    asyncio.run(compare())


def test_errors_keep_their_type_and_message(tiny_checkpoint: Path) -> None:
    async def ask() -> None:
        async with child(tiny_checkpoint, "raising") as engine:
            with pytest.raises(RequestError, match=r"prompt_ids\[1\] is 99999; the vocabulary has ids 0 to 5140"):
                await deltas(engine, request(1, 99999))
            with pytest.raises(CapacityError, match="positions"):
                await deltas(engine, request(1, new_tokens=40000))
            with pytest.raises(ZeroDivisionError, match="the trigger was pulled") as raised:
                await engine.logits([TRIGGER])
            assert "misbehave" in "".join(raised.value.__notes__)
            assert len(await deltas(engine, request(1))) == 8

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("aborting", "was killed by SIGABRT; it last printed: assertion failed in the native library"),
        ("exiting", "ended with exit code 7 and printed nothing"),
        ("segfaulting", "was killed by SIGSEGV"),
    ],
)
def test_a_crash_is_told_and_every_open_call_ends(tiny_checkpoint: Path, factory: str, said: str) -> None:
    async def crash() -> None:
        async with child(tiny_checkpoint, factory) as engine:
            other = asyncio.create_task(deltas(engine, request(1, new_tokens=5000)))
            await asyncio.sleep(0.2)
            with pytest.raises(EngineDied, match=said):
                await engine.logits([TRIGGER])
            with pytest.raises(EngineDied, match=said):
                await other
            assert not engine.alive
            with pytest.raises(EngineDied, match=said):
                await deltas(engine, request(1))
            await engine.close()

    asyncio.run(crash())


@pytest.mark.parametrize("factory", ["hanging", "waiting"])
def test_a_hanging_engine_can_be_killed_and_its_open_calls_end(tiny_checkpoint: Path, factory: str) -> None:
    async def hang() -> None:
        async with child(tiny_checkpoint, factory) as engine:
            call = asyncio.create_task(engine.logits([TRIGGER]))
            await asyncio.sleep(0.3)
            assert not call.done()
            await engine.kill()
            with pytest.raises(EngineDied, match="was ended"):
                await call

    asyncio.run(hang())


def test_closing_a_request_frees_its_place_before_it_returns(tiny_checkpoint: Path) -> None:
    async def cancel() -> None:
        async with child(tiny_checkpoint) as engine:
            for prompt in range(40, 64):  # each reserves most of the cache's 8192 positions
                async with aclosing(engine.generate(request(prompt, new_tokens=8000))) as stream:
                    assert len((await anext(stream)).ids) == 1
            assert len(await asyncio.wait_for(deltas(engine, request(1, new_tokens=20)), 20)) == 20

    asyncio.run(cancel())


def test_what_a_library_prints_does_not_disturb_the_answers(tiny_checkpoint: Path) -> None:
    async def ask() -> None:
        async with child(tiny_checkpoint, "chatty") as engine:
            assert (await engine.logits([TRIGGER])).shape == (1, 5141)
            assert "progress: 50 %" in engine.printed()

    asyncio.run(ask())


def test_closing_twice_is_harmless_and_further_calls_are_refused(tiny_checkpoint: Path) -> None:
    async def close() -> None:
        async with child(tiny_checkpoint) as engine:
            pid = engine.pid
            await engine.close()
            await engine.close()
            with pytest.raises(RequestError, match="closed"):
                await engine.logits([1])
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    asyncio.run(close())


@pytest.mark.parametrize(
    ("factory", "kind", "said"),
    [
        ("failing", BackendError, "the device is busy"),
        ("padded", BackendError, "5152"),
        ("aborting_at_load", EngineDied, "killed by SIGABRT; it last printed: cannot map the weights"),
    ],
)
def test_an_engine_that_cannot_be_loaded_says_why(
    tiny_checkpoint: Path, factory: str, kind: type[Exception], said: str
) -> None:
    async def start() -> None:
        async with child(tiny_checkpoint, factory):
            raise AssertionError("it was loaded")

    with pytest.raises(kind, match=said):
        asyncio.run(start())


def test_a_delta_that_is_none_is_a_fault(tiny_checkpoint: Path) -> None:
    async def ask() -> None:
        async with child(tiny_checkpoint, "yielding_lists") as engine:
            with pytest.raises(EngineFault, match=r"generate yielded list; expected a .*TokenDelta"):
                await deltas(engine, request(1))

    asyncio.run(ask())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.parametrize("factory", ["healthy", "hanging"])
def test_the_child_dies_with_its_parent(tiny_checkpoint: Path, factory: str) -> None:
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from gpa_conformance.isolation import ChildEngine\n"
        "from gpa_conformance.target import make_target\n"
        "async def main():\n"
        "    target = make_target(Path(sys.argv[1]), engine=sys.argv[2], options={})\n"
        "    engine = await ChildEngine.start(target)\n"
        "    print(engine.pid, flush=True)\n"
        f"    await engine.logits([{TRIGGER}])\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script, str(tiny_checkpoint), f"{CROOKED}:{factory}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)
