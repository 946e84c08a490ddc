"""The real SGLang, where it is installed: `tox -e sglang` does that on a CPU. Skipped elsewhere.

In process, over HTTP, and whether the fakes of the other tests have the shapes of what they stand for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import CapacityError, DeclinedRequest
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams
from gpa_engines.registry import create_engine
from gpa_engines.servers.http_server import HttpServer, ServerAccess, ServerRefused
from gpa_engines.servers.kind import find_kind
from gpa_engines.servers.sglang_fields import NEVER, native_fields, reading_fields
from gpa_engines.servers.sglang_server import SglangServer, connect_server
from tests.engines.generating import answer, answers
from tests.servers.fake_sglang_server import FakeSglangServer
from tests.servers.real_servers import RealSglang

pytestmark = [
    pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed; tox -e sglang installs it"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

PROMPT = (1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def torch_engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    engine = create_engine("torch", tiny_checkpoint, device="cpu")
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    engine = create_engine("sglang", tiny_checkpoint, device="cpu", prefill_chunk=64)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server."""
    server = RealSglang(tiny_checkpoint, tmp_path_factory.mktemp("server") / "printed.txt", context=512)
    server.start()
    yield server.url
    server.kill()


def mixed(count: int) -> list[GenerationRequest]:
    """Greedy and sampled, whole vocabulary and a part, with penalties and minima."""
    requests = []
    for index in range(count):
        prompt = tuple((7 * index + place) % 5000 for place in range(3 + 5 * (index % 9)))
        greedy = SamplingParams(max_new_tokens=12 + index % 5)
        sampled = SamplingParams(0.9, 40, 0.9, 0.01, 1.2, max_new_tokens=12, min_new_tokens=index % 4, seed=index)
        allowed = (range(100, 900),) if index % 3 == 0 else None
        requests.append(GenerationRequest(prompt, sampled if index % 2 else greedy, (5, 150), allowed))
    return requests


def test_answers_are_those_of_the_torch_engine_alone_and_together(engine: Engine, torch_engine: Engine) -> None:
    async def all_of_them() -> None:
        requests = mixed(32)
        expected = await answers(torch_engine, requests)
        together = await answers(engine, requests)
        alone = [await answer(engine, each) for each in requests]
        assert [each.ids for each in together] == [each.ids for each in alone] == [each.ids for each in expected]
        assert [each.finish_reason for each in together] == [each.finish_reason for each in expected]

    asyncio.run(all_of_them())


def test_logits_of_a_prompt_that_is_read_in_parts(engine: Engine, torch_engine: Engine) -> None:
    async def both() -> None:
        ids = [(13 * place) % 5000 for place in range(200)]
        rows, expected = await engine.logits(ids), await torch_engine.logits(ids)
        assert np.linalg.norm(rows - expected) / np.linalg.norm(expected) < 1e-5

    asyncio.run(both())


@pytest.mark.parametrize("sampling", ["native", "rule"])
def test_over_http_too(url: str, tiny_checkpoint: Path, torch_engine: Engine, sampling: Any) -> None:
    async def both() -> None:
        engine = connect_server(tiny_checkpoint, sampling, url, None, True, "float32", None)
        requests = [
            GenerationRequest(PROMPT, SamplingParams(max_new_tokens=12)),
            GenerationRequest(PROMPT, SamplingParams(max_new_tokens=12, min_new_tokens=4), (778, 2804)),
            GenerationRequest(
                PROMPT, SamplingParams(max_new_tokens=12, repetition_penalty=1.3), (9,), (range(100, 900),)
            ),
        ]
        requests += mixed(8) if sampling == "rule" else []
        expected = await answers(torch_engine, requests)
        assert [each.ids for each in await answers(engine, requests)] == [each.ids for each in expected]
        ids = list(range(40))
        for _ in range(2):
            rows, reference = await engine.logits(ids), await torch_engine.logits(ids)
            assert np.linalg.norm(rows - reference) / np.linalg.norm(reference) < 1e-5
        await engine.close()

    asyncio.run(both())


def test_the_models_end_id_is_gone_beyond_over_http(url: str, tiny_checkpoint: Path, torch_engine: Engine) -> None:
    """The end id of the checkpoint as the only id that may come ends every leg at its first token."""
    import json

    end = json.loads((tiny_checkpoint / "config.json").read_text()).get("eos_token_id")
    if not isinstance(end, int):
        pytest.skip("the checkpoint names no end id")

    async def both() -> None:
        engine = connect_server(tiny_checkpoint, "native", url, None, True, "float32", None)
        wanted = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=3), (), (range(end, end + 1),))
        assert (await answer(engine, wanted)).ids == (await answer(torch_engine, wanted)).ids == (end,) * 3
        await engine.close()

    asyncio.run(both())


def test_what_a_fleet_asks_of_a_real_server(url: str, tiny_checkpoint: Path, torch_engine: Engine) -> None:
    async def ask() -> None:
        engine = connect_server(tiny_checkpoint, "native", url, None, True, "float32", None)
        server = HttpServer(ServerAccess(url))
        kind = await find_kind(server)
        assert kind.name == "sglang"
        await server.close()
        assert await engine.busy() == 0
        row = (await torch_engine.logits(PROMPT))[-1]
        assert list(await engine.top_scores(PROMPT, 5)) == np.argsort(-row)[:5].tolist()
        names = await engine.token_names((5, 6))
        assert names is not None
        assert len(names) == 2
        await _break_off(engine)
        await engine.close()

    asyncio.run(ask())


async def _break_off(engine: SglangServer) -> None:
    async with aclosing(engine.generate(GenerationRequest(PROMPT, SamplingParams(max_new_tokens=400)))) as stream:
        await anext(stream)
        await _until_busy(engine, 1, stream)
    await _until_busy(engine, 0)


async def _until_busy(engine: SglangServer, count: int, stream: Any = None) -> None:
    """The server's own count comes some steps late."""
    async with asyncio.timeout(5):
        while await engine.busy() != count:
            if stream is not None:
                await anext(stream)


def test_a_real_server_refuses_in_words(url: str, tiny_checkpoint: Path) -> None:
    async def go() -> None:
        server = HttpServer(ServerAccess(url))
        engine = connect_server(tiny_checkpoint, "native", url, None, True, "float32", None)
        with pytest.raises(CapacityError):
            await answer(engine, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=600)))
        body = {"rid": "a" * 32, "input_ids": [1], "stream": False}
        for fields, words in (({"temperature": -1}, "temperature"), ({"no_such": 1}, "no_such")):
            with pytest.raises(ServerRefused, match=words) as refused:
                await server.post_json("/generate", body | {"sampling_params": fields})
            assert refused.value.status == 400
        await server.close()
        await engine.close()

    asyncio.run(go())


def test_the_fake_has_the_shapes_of_the_real_one(url: str, tiny_checkpoint: Path) -> None:
    """What is read of events and answers, and how both end: the fake and the real one say the same."""

    async def seen(where: str) -> list[Any]:
        server = HttpServer(ServerAccess(where))
        free = native_fields(GenerationRequest(PROMPT, SamplingParams(max_new_tokens=4)), (), 0, 5141)
        body = {"rid": "b" * 32, "input_ids": list(PROMPT), "sampling_params": free, "stream": True}
        events = [event async for event in server.post_events("/generate", body)]
        stops = free | {"stop_token_ids": [events[-1]["output_ids"][1]]}
        ended = [each async for each in server.post_events("/generate", body | {"sampling_params": stops})]
        wrong = free | {"temperature": -1.0}
        inside = [each async for each in server.post_events("/generate", body | {"sampling_params": wrong})]
        reading = body | {"sampling_params": reading_fields(), "stream": False, "return_hidden_states": True}
        states = await server.post_json("/generate", reading | {"cache_salt": "c" * 32})
        cached = await server.post_json("/generate", reading | {"cache_salt": "c" * 32})
        ignoring = await server.post_json(
            "/generate", body | {"sampling_params": stops | {"ignore_eos": True}, "stream": False}
        )
        info = await server.get_json("/server_info")
        refusal = ""
        try:
            await server.post_json("/generate", reading | {"sampling_params": free | {"logit_bias": {"5141": NEVER}}})
        except ServerRefused as error:
            refusal = error.detail
        await server.close()
        return [
            [event["output_ids"] for event in events],
            [event["meta_info"]["completion_tokens"] for event in events],
            [event["meta_info"]["finish_reason"] for event in (*events, *ended)],
            inside,
            np.shape(states["meta_info"]["hidden_states"]),
            np.shape(cached["meta_info"]["hidden_states"]),
            ignoring["meta_info"]["finish_reason"],
            info["max_req_input_len"],
            refusal,
        ]

    options: dict[str, Any] = {"enable_return_hidden_states": True, "max_total_tokens": 8192, "context_length": 512}
    with FakeSglangServer(tiny_checkpoint, disable_overlap_schedule=True, **options) as fake:
        assert asyncio.run(seen(fake.url)) == asyncio.run(seen(url))


def test_the_rule_on_a_real_server_ends_an_impossible_request_and_no_other(url: str, tiny_checkpoint: Path) -> None:
    async def go() -> None:
        engine = connect_server(tiny_checkpoint, "rule", url, None, True, "float32", None)
        impossible = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=4, min_new_tokens=1), (7,), (range(7, 8),))
        good = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=4))
        refused, given = await asyncio.gather(answer(engine, impossible), answer(engine, good), return_exceptions=True)
        assert isinstance(refused, DeclinedRequest)
        assert "no token is possible" in str(refused)
        assert not isinstance(given, BaseException)
        assert len(given.ids) == 4
        await engine.close()

    asyncio.run(go())
