"""The remote engine over a real SGLang server, alone and beside a real vLLM server.

Runs where SGLang is: `tox -e sglang`, or GPA_SGLANG_PYTHON names a Python that has it; what needs vLLM too, where that
is (GPA_VLLM_PYTHON).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("torch", reason="needs torch, with which the servers are compared")

from gpa_codecs.errors import DeclinedRequest, RequestError
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams
from gpa_engines.registry import create_engine
from gpa_engines.servers.http_server import ServerRefused
from tests.backends.remote.real_fleets import (
    check_greedy,
    check_logits,
    check_speech_task,
    outcomes_of,
    prompts,
    start_streams,
)
from tests.servers.asking import answer, request
from tests.servers.real_servers import RealServer, RealSglang, RealVllm, sglang_python, vllm_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        sglang_python() is None,
        reason="SGLang is not here, and GPA_SGLANG_PYTHON names no Python that has it",
    ),
]

KEY = "the-key-of-the-test"


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSglang]:
    """One server for all tests; who kills it starts it again."""
    real = RealSglang(tiny_checkpoint, tmp_path_factory.mktemp("sglang") / "printed.txt", KEY)
    real.start()
    yield real
    real.kill()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPA_REMOTE_KEY", KEY)


@pytest.fixture
def remote(server: RealSglang, tiny_checkpoint: Path) -> Iterator[Engine]:
    engine = connect(tiny_checkpoint, server)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture
def local(tiny_checkpoint: Path) -> Iterator[Engine]:
    engine = create_engine("torch", tiny_checkpoint, device="cpu", dtype="float32", threads=1)
    yield engine
    asyncio.run(engine.close())


def connect(folder: Path, *servers: RealServer) -> Engine:
    return create_engine("remote", folder, url=[each.url for each in servers], recheck=0.2, connect_timeout=30.0)


def greedy_requests() -> list[GenerationRequest]:
    """Plain, restricted, with stop ids and minima, and penalised where no id of the prompt may come."""
    stops = tuple(range(100, 5141, 9))
    kinds: list[dict[str, Any]] = [
        {"sampling": SamplingParams(max_new_tokens=24)},
        {"sampling": SamplingParams(max_new_tokens=24), "stop_ids": stops},
        {"sampling": SamplingParams(max_new_tokens=24), "allowed": (range(700, 2000), range(4816, 5136))},
        {"sampling": SamplingParams(max_new_tokens=24, repetition_penalty=1.2), "allowed": (range(3),)},
        {"sampling": SamplingParams(max_new_tokens=24, min_new_tokens=9), "stop_ids": stops},
        {"sampling": SamplingParams(max_new_tokens=1), "stop_ids": stops},
    ]
    return [GenerationRequest(prompt, **kinds[index % len(kinds)]) for index, prompt in enumerate(prompts(16))]


def test_it_says_what_it_is(remote: Engine, server: RealSglang) -> None:
    info = remote.info
    assert (info.backend, info.device, info.dtype) == ("remote", server.url, "float32")
    assert info.vocab_size == 5141
    assert info.capabilities == {"logits", "batch", "allowed", "chunked_prefill"}
    assert info.note.startswith("SGLang ")
    assert info.note.endswith("; weights compared with torch on cpu")


def test_greedy_answers_are_the_torch_engines_alone_and_in_company(remote: Engine, local: Engine) -> None:
    asyncio.run(check_greedy(remote, local, greedy_requests()))


def test_logits_are_the_torch_engines(remote: Engine, local: Engine) -> None:
    asyncio.run(check_logits(remote, local))


def test_what_its_sampler_would_do_otherwise_is_refused(remote: Engine) -> None:
    async def main() -> None:
        for sampling, message in (
            ({"repetition_penalty": 1.2}, "repetition_penalty"),
            ({"temperature": 0.5, "top_k": 5, "top_p": 0.5}, "top_k"),
        ):
            with pytest.raises(DeclinedRequest, match=message):
                await answer(remote, request((1, 2, 3), 2, **sampling))
        assert len((await answer(remote, request((1, 2, 3), 2))).ids) == 2

    asyncio.run(main())


def test_a_wrong_key_is_refused(server: RealSglang, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPA_REMOTE_KEY", "wrong")
    with pytest.raises(ServerRefused, match="the key that was sent is not the server's"):
        connect(tiny_checkpoint, server)


@pytest.mark.parametrize(
    "task",
    [
        ("--task", "stt", "--src-audio", "zh_female_16k.wav"),
        ("--task", "tts-a", "--ref-audio", "en_male.ogg", "--text", "Hello there."),
        (
            "--task",
            "vc",
            "--src-audio",
            "en_female.flac",
            "--ref-audio",
            "en_male_16k.wav",
            "--repetition-penalty",
            "1",
        ),
    ],
    ids=lambda task: task[1],
)
def test_the_speech_tasks_are_the_torch_engines(
    task: tuple[str, ...],
    server: RealSglang,
    tiny_checkpoint: Path,
    audio_dir: Path,
    tmp_path: Path,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    check_speech_task(task, server.url, tiny_checkpoint, audio_dir, tmp_path, capfdbinary)


def test_a_server_killed_in_the_middle_of_16_streams(remote: Engine, local: Engine, server: RealSglang) -> None:
    requests = [request(prompt, 300) for prompt in prompts(16)]

    async def main() -> None:
        expected = [await answer(local, each) for each in requests]
        running = await start_streams(remote, requests, expected)
        await asyncio.to_thread(server.kill)
        given = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 60)
        assert len(outcomes_of(given, expected)[1]) == 16
        with pytest.raises(RequestError, match=r"no engine is left: .* cannot be reached: .*is the server running"):
            await asyncio.wait_for(answer(remote, requests[0]), 60)
        await asyncio.to_thread(server.start)
        again = await asyncio.gather(*(answer(remote, request(prompt, 12)) for prompt in prompts(16)))
        assert [each.ids for each in again] == [each.ids[:12] for each in expected]

    asyncio.run(main())


@pytest.mark.skipif(vllm_python() is None, reason="vLLM is not here, and GPA_VLLM_PYTHON names no Python that has it")
def test_a_fleet_of_both_kinds_goes_on_when_one_is_killed(
    server: RealSglang, tiny_checkpoint: Path, local: Engine, tmp_path: Path
) -> None:
    other = RealVllm(tiny_checkpoint, tmp_path / "vllm.log", KEY)
    requests = [request(prompt, 300) for prompt in prompts(16)]
    try:
        other.start()
        engine = connect(tiny_checkpoint, server, other)

        async def main() -> None:
            expected = [await answer(local, each) for each in requests]
            await check_logits(engine, local)
            penalised = [request(prompt, 12, repetition_penalty=1.3) for prompt in prompts(4)]
            for wanted in penalised:
                assert (await answer(engine, wanted)).ids == (await answer(local, wanted)).ids, "SGLang declines these"
            running = await start_streams(engine, requests, expected)
            await asyncio.to_thread(server.kill)
            given = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 200)
            whole, errors = outcomes_of(given, expected)
            assert whole >= 8, "those of the other server, and those that had given nothing"
            assert all(server.url in str(error) for error in errors)
            after = await asyncio.gather(*(answer(engine, request(prompt, 12)) for prompt in prompts(8)))
            assert [each.ids for each in after] == [each.ids[:12] for each in expected[:8]]
            await engine.close()

        asyncio.run(main())
    finally:
        other.kill()
        server.start()
