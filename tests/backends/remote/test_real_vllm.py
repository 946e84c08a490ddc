"""The remote engine over real vLLM servers: the torch engine's answers, and servers that are killed and come back.

Runs where vLLM is: `tox -e vllm`, or GPA_VLLM_PYTHON names a Python that has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("torch", reason="needs torch, with which vLLM is compared")

from gpa_codecs.errors import BackendError, CapacityError, DeclinedRequest, RequestError
from gpa_engines.cli.run import main as gpa_run
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams
from gpa_engines.registry import create_engine
from gpa_engines.sampling import Sampler
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
from tests.servers.real_servers import RealVllm, vllm_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        vllm_python() is None, reason="vLLM is not installed here, and GPA_VLLM_PYTHON names no Python that has it"
    ),
]

KEY = "the-key-of-the-test"


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealVllm]:
    """One server for all tests; who kills it starts it again."""
    real = RealVllm(tiny_checkpoint, tmp_path_factory.mktemp("vllm") / "one.log", KEY)
    real.start()
    yield real
    real.kill()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPA_REMOTE_KEY", KEY)


@pytest.fixture
def remote(server: RealVllm, tiny_checkpoint: Path, key: None) -> Iterator[Engine]:
    engine = create_engine("remote", tiny_checkpoint, url=server.url, recheck=0.2, connect_timeout=30.0)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture
def local(tiny_checkpoint: Path) -> Iterator[Engine]:
    engine = create_engine("torch", tiny_checkpoint, device="cpu", dtype="float32", threads=1)
    yield engine
    asyncio.run(engine.close())


def greedy_requests() -> list[GenerationRequest]:
    """Plain, penalised, restricted, with stop ids and with minima."""
    stops = tuple(range(100, 5141, 9))
    kinds: list[dict[str, Any]] = [
        {"sampling": SamplingParams(max_new_tokens=24)},
        {"sampling": SamplingParams(max_new_tokens=24, repetition_penalty=1.3)},
        {"sampling": SamplingParams(max_new_tokens=24, repetition_penalty=0.8), "stop_ids": stops},
        {"sampling": SamplingParams(max_new_tokens=24), "allowed": (range(700, 2000), range(4816, 5136))},
        {
            "sampling": SamplingParams(max_new_tokens=24, repetition_penalty=1.2),
            "allowed": (range(3),),
            "stop_ids": (514,),
        },
        {"sampling": SamplingParams(max_new_tokens=24, min_new_tokens=9), "stop_ids": stops},
        {"sampling": SamplingParams(max_new_tokens=24, min_new_tokens=9), "stop_ids": (*stops, 514)},
        {"sampling": SamplingParams(max_new_tokens=1), "stop_ids": stops},
    ]
    return [GenerationRequest(prompt, **kinds[index % len(kinds)]) for index, prompt in enumerate(prompts(16))]


def test_it_says_what_it_is(remote: Engine, server: RealVllm) -> None:
    info = remote.info
    assert (info.backend, info.device, info.dtype) == ("remote", server.url, "float32")
    assert (info.vocab_size, info.max_context) == (5141, 2048)
    assert info.capabilities == {"logits", "batch", "allowed", "seed"}
    assert info.note.startswith("vLLM ")
    assert info.note.endswith("; weights compared with torch on cpu")


def test_greedy_answers_are_the_torch_engines_alone_and_in_company(remote: Engine, local: Engine) -> None:
    asyncio.run(check_greedy(remote, local, greedy_requests()))


def test_logits_are_the_torch_engines(remote: Engine, local: Engine) -> None:
    asyncio.run(check_logits(remote, local))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7, "top_k": 8},
        {"temperature": 1.3, "top_p": 0.02},
        {"temperature": 1.0, "min_p": 0.6},
        {"temperature": 0.2, "top_k": 50, "repetition_penalty": 1.2},
        {"temperature": 0.5, "top_k": 20, "min_p": 0.5},
    ],
)
def test_draws_follow_the_shared_rule(sampling: dict[str, Any], remote: Engine) -> None:
    """First tokens of 200 requests: only ids that the rule keeps, about as often as it says."""
    prompt = prompts(4)[3]
    params = SamplingParams(max_new_tokens=1, **sampling)

    async def main() -> None:
        row = (await remote.logits(prompt))[-1]
        ids, probabilities = Sampler(params, prompt).distribution(row)
        wanted = [request(prompt, 1, seed=seed, **sampling) for seed in range(200)]
        first = await asyncio.gather(*(answer(remote, each) for each in wanted))
        drawn = [each.ids[0] for each in first]
        assert set(drawn) <= set(ids.tolist())
        counts = np.array([drawn.count(token) for token in ids])
        # Each count is binomial; five standard deviations and a half are never left by chance.
        deviation = np.sqrt(200 * probabilities * (1 - probabilities)) + 1
        assert (np.abs(counts - 200 * probabilities) < 5.5 * deviation).all()
        again = await asyncio.gather(*(answer(remote, each) for each in wanted[:20]))
        assert [each.ids for each in again] == [each.ids for each in first[:20]], "the same seed, the same token"

    asyncio.run(main())


@pytest.mark.parametrize(
    "task",
    [
        ("--task", "stt", "--src-audio", "zh_female_16k.wav"),
        ("--task", "tts-a", "--ref-audio", "en_male.ogg", "--text", "Hello there."),
        ("--task", "vc", "--src-audio", "en_female.flac", "--ref-audio", "en_male_16k.wav"),
    ],
    ids=lambda task: task[1],
)
def test_the_speech_tasks_are_the_torch_engines_without_the_weights(
    task: tuple[str, ...],
    server: RealVllm,
    tiny_checkpoint_copy: Path,
    audio_dir: Path,
    tmp_path: Path,
    key: None,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    assert gpa_run(["fingerprint", "--model", str(tiny_checkpoint_copy)]) == 0
    weights = tiny_checkpoint_copy / "model.safetensors"
    check_speech_task(task, server.url, tiny_checkpoint_copy, audio_dir, tmp_path, capfdbinary, unlink=weights)


def test_bad_requests_are_said_and_harm_nobody(remote: Engine) -> None:
    async def main() -> None:
        for wanted, error, message in (
            (request((1, 5141), 2), RequestError, r"prompt_ids\[1\] is 5141; the vocabulary has ids 0 to 5140"),
            (request((1,) * 2000, 100), CapacityError, "need 2100 positions; the smallest server has 2048"),
            (request((1,), 2, temperature=1.0, top_p=0.5, min_p=0.1), DeclinedRequest, "both given"),
            (request((1,), 2, temperature=0.005), DeclinedRequest, "temperature is 0.005"),
        ):
            with pytest.raises(error, match=message):
                await answer(remote, wanted)
        assert len((await answer(remote, request((1,) * 2000, 48))).ids) == 48, "just fits"

    asyncio.run(main())


def test_leaving_a_stream_frees_the_server(remote: Any, server: RealVllm) -> None:
    async def main() -> None:
        member = remote._members[0].engine
        async with aclosing(remote.generate(request((1, 2, 3), 2000))) as deltas:
            await anext(deltas)
            assert await member.busy() == 1
        for _ in range(100):
            if await member.busy() == 0:
                break
            await asyncio.sleep(0.1)
        assert await member.busy() == 0

    asyncio.run(main())


def test_a_wrong_key_and_another_model_are_refused(
    server: RealVllm, tiny_checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServerRefused, match="401: Unauthorized: the server asks for a key; set GPA_REMOTE_KEY"):
        create_engine("remote", tiny_checkpoint_copy, url=server.url)
    monkeypatch.setenv("GPA_REMOTE_KEY", "wrong")
    with pytest.raises(ServerRefused, match="the key that was sent is not the server's"):
        create_engine("remote", tiny_checkpoint_copy, url=server.url)
    monkeypatch.setenv("GPA_REMOTE_KEY", KEY)
    from safetensors.torch import load_file, save_file

    path = tiny_checkpoint_copy / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**weights, name: weights[name] * 1.1}, path, {"format": "pt"})
    with pytest.raises(BackendError, match="does not hold the weights of torch on cpu"):
        create_engine("remote", tiny_checkpoint_copy, url=server.url)
    config = tiny_checkpoint_copy / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 5141', '"vocab_size": 5140'))
    with pytest.raises(BackendError, match="vocabulary is larger than the 5140 ids of the model's folder"):
        create_engine("remote", tiny_checkpoint_copy, url=server.url, expect="none")


def test_a_server_killed_in_the_middle_of_16_streams(remote: Engine, local: Engine, server: RealVllm) -> None:
    requests = [request(prompt, 400) for prompt in prompts(16)]

    async def main() -> None:
        expected = [await answer(local, each) for each in requests]
        running = await start_streams(remote, requests, expected, each_gave=5)
        await asyncio.to_thread(server.kill)
        given = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 60)
        whole, errors = outcomes_of(given, expected)
        assert (whole, len(errors)) == (0, 16)
        assert all("had come; ask again for the whole" in str(error) for error in errors)
        with pytest.raises(RequestError, match=r"no engine is left: .* cannot be reached: .*is the server running"):
            await asyncio.wait_for(answer(remote, requests[0]), 60)
        await asyncio.to_thread(server.start)
        short = [request(prompt, 12) for prompt in prompts(16)]
        again = await asyncio.gather(*(answer(remote, each) for each in short))
        assert [each.ids for each in again] == [each.ids[:12] for each in expected]

    asyncio.run(main())


def test_one_of_two_servers_is_killed(
    server: RealVllm, tiny_checkpoint: Path, local: Engine, key: None, tmp_path: Path
) -> None:
    other = RealVllm(tiny_checkpoint, tmp_path / "two.log", KEY)
    requests = [request(prompt, 300) for prompt in prompts(16)]
    try:
        other.start()
        engine = create_engine(
            "remote", tiny_checkpoint, url=[server.url, other.url], recheck=0.2, connect_timeout=30.0
        )

        async def main() -> None:
            expected = [await answer(local, each) for each in requests]
            running = await start_streams(engine, requests, expected)
            await asyncio.to_thread(other.kill)
            given = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 200)
            whole, errors = outcomes_of(given, expected)
            assert whole >= 8, "those of the other server, and those that had given nothing"
            assert all(other.url in str(error) for error in errors)
            short = [request(prompt, 12) for prompt in prompts(8)]
            after = await asyncio.gather(*(answer(engine, each) for each in short))
            assert [each.ids for each in after] == [each.ids[:12] for each in expected[:8]]
            await engine.close()

        asyncio.run(main())
    finally:
        other.kill()
