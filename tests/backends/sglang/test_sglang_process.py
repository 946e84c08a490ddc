"""SGLang in a process of its own, with a fake of the package in it: what is started, and that nothing outlives it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import BackendError, RequestError
from gpa_engines.backends.sglang.process import SglangProcess, explain, explain_start
from gpa_engines.backends.torch import create_engine as create_torch
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams
from gpa_engines.registry import create_engine
from tests.engines.generating import answer, answers

PROMPT = (1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def shared(fake_sglang: Path, tiny_checkpoint: Path) -> Iterator[Engine]:
    """For tests that leave it as they found it."""
    engine = create_engine("sglang", tiny_checkpoint, device="cpu")
    yield engine
    asyncio.run(engine.close())


@pytest.fixture
def engine(fake_sglang: Path, tiny_checkpoint: Path) -> Iterator[Engine]:
    engine = create_engine("sglang", tiny_checkpoint, device="cpu")
    yield engine
    asyncio.run(engine.close())


def process_of(engine: Any) -> SglangProcess:
    return engine._transport


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(") ")[2][0] != "Z"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 15
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} outlives its engine"
        time.sleep(0.05)


def test_it_answers_like_the_torch_engine_and_says_what_it_is(shared: Engine, tiny_checkpoint: Path) -> None:
    async def both() -> None:
        reference = create_torch(tiny_checkpoint, device="cpu")
        sampled = SamplingParams(0.8, 30, 0.9, 0.01, 1.2, max_new_tokens=10, seed=4)
        wanted = [
            GenerationRequest(PROMPT, SamplingParams(max_new_tokens=10)),
            GenerationRequest(PROMPT * 4, sampled, (7,), (range(100, 900),)),
        ] * 4
        given, expected = await answers(shared, wanted), await answers(reference, wanted)
        assert [each.ids for each in given] == [each.ids for each in expected]
        assert np.abs(await shared.logits(PROMPT) - await reference.logits(PROMPT)).max() < 1e-4
        await reference.close()

    asyncio.run(both())
    info = shared.info
    assert (info.backend, info.device, info.dtype) == ("sglang", "cpu", "float32")
    assert info.capabilities == {"logits", "batch", "allowed", "seed", "chunked_prefill"}


def test_several_event_loops_one_after_the_other(shared: Engine) -> None:
    wanted = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=3))
    assert asyncio.run(answer(shared, wanted)).ids == asyncio.run(answer(shared, wanted)).ids


def test_breaking_off_leaves_room_for_others(shared: Engine) -> None:
    async def go() -> None:
        for _ in range(3):
            async with aclosing(
                shared.generate(GenerationRequest(PROMPT, SamplingParams(max_new_tokens=900)))
            ) as deltas:
                await anext(deltas)
        task = asyncio.create_task(answer(shared, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=900))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        started = time.monotonic()
        await answer(shared, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=2)))
        assert time.monotonic() - started < 5

    asyncio.run(go())


def test_closing_ends_the_process_and_what_runs(engine: Engine) -> None:
    async def go() -> None:
        stream = engine.generate(GenerationRequest(PROMPT, SamplingParams(max_new_tokens=900)))
        await anext(stream)
        await engine.close()
        assert [delta async for delta in stream][-1].finish_reason == "cancelled"
        with pytest.raises(RequestError, match="closed"):
            await answer(engine, GenerationRequest(PROMPT))
        await engine.close()

    pid = process_of(engine).pid
    assert alive(pid)
    asyncio.run(go())
    wait_until_gone(pid)


def test_a_process_that_dies_is_told_to_those_who_wait_and_those_who_come(engine: Engine) -> None:
    async def go() -> None:
        stream = engine.generate(GenerationRequest(PROMPT, SamplingParams(max_new_tokens=900)))
        await anext(stream)
        os.kill(process_of(engine).pid, signal.SIGKILL)
        with pytest.raises(RequestError, match=r"SGLang's process ended.*create a new engine"):
            async for _ in stream:
                pass
        with pytest.raises(RequestError, match="create a new engine"):
            await answer(engine, GenerationRequest(PROMPT))

    asyncio.run(go())


def test_what_killed_it_is_told(engine: Engine) -> None:
    async def go() -> None:
        body = {"rid": "x", "input_ids": [10**6], "sampling_params": {"max_new_tokens": 1}}
        with pytest.raises(RequestError, match="IndexError: index out of range in self"):
            await process_of(engine).ask(body)

    asyncio.run(go())


def test_sglangs_own_errors_are_refusals(shared: Engine) -> None:
    async def go() -> None:
        body = {"rid": "x", "input_ids": [1], "sampling_params": {"temperature": -1}}
        for send in (process_of(shared).ask(body), anext(process_of(shared).stream(body))):
            with pytest.raises(RequestError, match="refused the request: temperature must be"):
                await send
        with pytest.raises(RequestError, match="TypeError: Unexpected keyword argument 'foo'"):
            await process_of(shared).ask(body | {"sampling_params": {"foo": 1}})

    asyncio.run(go())


@pytest.mark.parametrize("how", ["forgotten", "exits", "killed"])
def test_nothing_outlives_the_program(fake_sglang: Path, tiny_checkpoint: Path, how: str) -> None:
    program = f"""
        import os, signal, sys
        from gpa_engines.registry import create_engine
        engine = create_engine("sglang", {str(tiny_checkpoint)!r}, device="cpu")
        print(engine._transport.pid, flush=True)
        if {how!r} == "forgotten":
            del engine
            print("forgotten", flush=True)
            sys.stdin.read()
        if {how!r} == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        if how == "forgotten":
            assert child.stdout.readline() == "forgotten\n"
        else:
            child.wait(20)
        wait_until_gone(pid)
        child.communicate("")


def test_a_start_that_fails_says_why_and_leaves_no_process(fake_sglang: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match=r"Not enough memory.*lower mem_fraction"):
        create_engine("sglang", tiny_checkpoint, device="cpu", mem_fraction=0.001)
    with pytest.raises(BackendError, match="engine_args has no_such_field"):
        create_engine("sglang", tiny_checkpoint, device="cpu", no_such_field=1)


def test_without_cuda_the_remedy_is_named(fake_sglang: Path, tiny_checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(BackendError, match=r"no CUDA device.*device=cpu"):
        create_engine("sglang", tiny_checkpoint)


def test_the_causes_are_found_in_what_was_printed() -> None:
    printed = "INFO fine\nTraceback:\n  File x\nIndexError: index out of range\n[2026] SIGQUIT received\n"
    assert explain(printed) == "IndexError: index out of range"
    assert explain("") == ""
    assert "pip install" in explain_start("ModuleNotFoundError", "No module named 'zmq'")
