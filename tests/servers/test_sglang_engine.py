"""The SGLang engine over a fake server on loopback that has a real small model: answers are the torch engine's.

Both ways of sampling, both styles of streaming, and everything that a caller may do to a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import BackendError, CapacityError, DeclinedRequest, RequestError
from gpa_engines.backends.torch import create_engine as create_torch
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams
from gpa_engines.lm_config import LMConfig
from gpa_engines.registry import create_engine
from gpa_engines.servers.http_server import HttpServer, ServerAccess, ServerError, ServerLost, ServerRefused
from gpa_engines.servers.kind import ExpectedModel, ServerKind, find_kind
from gpa_engines.servers.sglang_engine import SglangFacts
from gpa_engines.servers.sglang_server import SglangServer, connect_server, open_engine
from tests.engines.generating import answer, answers
from tests.servers.fake_sglang_server import FakeSglangServer

PROMPT = (1, 2, 3, 4, 5)
SERVER_HAS: dict[str, Any] = {
    "enable_return_hidden_states": True,
    "enable_custom_logit_processor": True,
    "disable_overlap_schedule": True,
}


def run(function: Callable[[], Any]) -> Any:
    return asyncio.run(function())


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> LMConfig:
    return LMConfig.from_file(tiny_checkpoint / "config.json")


@pytest.fixture(scope="module", params=["one list that grows", "new ids alone"])
def server(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Iterator[FakeSglangServer]:
    incremental = request.param == "new ids alone"
    with FakeSglangServer(
        tiny_checkpoint, context_length=256, incremental_streaming_output=incremental, **SERVER_HAS
    ) as fake:
        yield fake


@pytest.fixture(scope="module")
def torch_engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    engine = create_torch(tiny_checkpoint, device="cpu")
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(params=["rule", "native"])
def engine(request: pytest.FixtureRequest, server: FakeSglangServer, tiny_checkpoint: Path) -> SglangServer:
    return connect_server(tiny_checkpoint, request.param, server.url, None, True, "float32", None)


def connect(server: FakeSglangServer, folder: Path, sampling: Any = "rule", **options: Any) -> SglangServer:
    return connect_server(folder, sampling, server.url, None, True, "float32", options.get("max_context"))


def test_greedy_answers_are_those_of_the_torch_engine(engine: SglangServer, torch_engine: Engine) -> None:
    async def both() -> None:
        wanted = [
            GenerationRequest(PROMPT, SamplingParams(max_new_tokens=12)),
            GenerationRequest(PROMPT, SamplingParams(max_new_tokens=12), (), (range(10, 40), range(70, 80))),
            GenerationRequest(PROMPT, SamplingParams(max_new_tokens=12, repetition_penalty=1.3), (), (range(10, 40),)),
        ]
        given, expected = await answers(engine, wanted), await answers(torch_engine, wanted)
        assert [each.ids for each in given] == [each.ids for each in expected]
        assert {each.finish_reason for each in given} == {"length"}
        assert all(each.usage.new_tokens == 12 and each.usage.prompt_tokens == len(PROMPT) for each in given)

    run(both)


def test_a_stop_id_ends_the_answer_and_is_no_part_of_it(engine: SglangServer) -> None:
    async def stop() -> None:
        free = await answer(engine, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=8)))
        token = free.ids[4]
        given = await answer(engine, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=8), (token,)))
        assert given.ids == free.ids[: free.ids.index(token)]
        assert given.finish_reason == "stop"

    run(stop)


def test_stop_ids_wait_for_the_minimum(engine: SglangServer, torch_engine: Engine) -> None:
    async def both() -> None:
        free = await answer(engine, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=8)))
        wanted = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=8, min_new_tokens=4), free.ids[:1])
        given, expected = await answer(engine, wanted), await answer(torch_engine, wanted)
        assert given.ids == expected.ids
        assert len(given.ids) >= 4

    run(both)


def test_the_models_own_end_id_ends_nothing_unless_it_is_a_stop_id(
    engine: SglangServer, server: FakeSglangServer
) -> None:
    async def go() -> None:
        wanted = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=8))
        free = await answer(engine, wanted)
        server.scheduler.end_ids.add(free.ids[3])
        try:
            sent = len(server.scheduler.seen)
            given = await answer(engine, wanted)
            legs = server.scheduler.seen[sent:]
        finally:
            server.scheduler.end_ids.discard(free.ids[3])
        assert given.ids == free.ids
        assert len(legs) > 1, "the fake did not end the answer"
        assert tuple(legs[1]["input_ids"]) == PROMPT + free.ids[:4]

    run(go)


def test_a_seed_gives_the_torch_engines_tokens_by_the_rule(
    server: FakeSglangServer, tiny_checkpoint: Path, torch_engine: Engine
) -> None:
    async def both() -> None:
        engine = connect(server, tiny_checkpoint)
        assert "seed" in engine.info.capabilities
        sampling = SamplingParams(0.9, 40, 0.9, 0.02, 1.2, max_new_tokens=16, min_new_tokens=3, seed=5)
        wanted = GenerationRequest(PROMPT * 3, sampling, (9,), (range(600),))
        given = await answer(engine, wanted)
        assert given.ids == (await answer(torch_engine, wanted)).ids
        assert given.usage.seed == 5

    run(both)


def test_a_seed_goes_on_behind_an_end_id(server: FakeSglangServer, tiny_checkpoint: Path) -> None:
    async def go() -> None:
        engine = connect(server, tiny_checkpoint)
        sampling = SamplingParams(1.0, repetition_penalty=1.1, max_new_tokens=10, seed=3)
        wanted = GenerationRequest(PROMPT, sampling)
        free = await answer(engine, wanted)
        server.scheduler.end_ids.update(free.ids[2:5])
        try:
            given = await answer(engine, wanted)
        finally:
            server.scheduler.end_ids.difference_update(free.ids[2:5])
        assert given.ids == free.ids

    run(go)


def test_a_long_prompt_that_is_read_in_parts_draws_once(tiny_checkpoint: Path, torch_engine: Engine) -> None:
    async def both(server: FakeSglangServer) -> None:
        engine = connect(server, tiny_checkpoint)
        wanted = GenerationRequest(tuple(range(50)), SamplingParams(1.0, max_new_tokens=6, seed=1))
        assert (await answer(engine, wanted)).ids == (await answer(torch_engine, wanted)).ids
        ids = list(range(50))
        rows = await engine.logits_at(ids, (3, 20, 49))
        assert np.abs(rows - (await torch_engine.logits(ids))[[3, 20, 49]]).max() < 1e-4

    with FakeSglangServer(tiny_checkpoint, chunked_prefill_size=16, **SERVER_HAS) as server:
        run(lambda: both(server))


def test_logits_are_whole_though_the_cache_knows_the_prompt(engine: SglangServer, torch_engine: Engine) -> None:
    async def both() -> None:
        await answer(engine, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=1)))
        expected = await torch_engine.logits(PROMPT)
        for _ in range(2):
            rows = await engine.logits(PROMPT)
            assert rows.shape == expected.shape
            assert rows.dtype == np.float32
            assert np.abs(rows - expected).max() < 1e-4
        assert (await engine.logits_at(PROMPT, ())).shape == (0, expected.shape[1])
        assert np.array_equal(await engine.logits_at(PROMPT, (1, 4)), rows[[1, 4]])

    run(both)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_breaking_off_aborts_the_request_on_the_server(
    engine: SglangServer, server: FakeSglangServer, how: str
) -> None:
    async def go() -> None:
        wanted = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=200))
        if how == "close":
            async with aclosing(engine.generate(wanted)) as deltas:
                await anext(deltas)
        else:
            task = asyncio.create_task(answer(engine, wanted))
            await _until(lambda: bool(server.scheduler.running))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await _until(lambda: not server.scheduler.running)
        assert server.scheduler.aborts[-1] == server.scheduler.seen[-1]["rid"]

    run(go)


def test_ids_have_one_length_since_aborts_go_by_prefix(engine: SglangServer, server: FakeSglangServer) -> None:
    async def go() -> None:
        sent = len(server.scheduler.seen)
        await answers(engine, [GenerationRequest(PROMPT, SamplingParams(max_new_tokens=2))] * 4)
        names = [body["rid"] for body in server.scheduler.seen[sent:]]
        assert len(set(names)) == 4
        assert {len(name) for name in names} == {32}

    run(go)


def test_closing_ends_what_runs_and_refuses_the_rest(engine: SglangServer) -> None:
    async def go() -> None:
        wanted = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=200))
        stream = engine.generate(wanted)
        await anext(stream)
        await engine.close()
        await engine.close()
        rest = [delta async for delta in stream]
        assert rest[-1].finish_reason == "cancelled"
        with pytest.raises(RequestError, match="closed"):
            await answer(engine, wanted)
        with pytest.raises(RequestError, match="closed"):
            await engine.logits(PROMPT)

    run(go)


@pytest.mark.parametrize("token", [-1, 5141, 2**31])
def test_an_id_outside_the_vocabulary_never_reaches_the_server(
    engine: SglangServer, server: FakeSglangServer, token: int
) -> None:
    async def go() -> None:
        sent = len(server.scheduler.seen)
        for wanted in (
            GenerationRequest((1, token)),
            GenerationRequest(PROMPT, stop_ids=(token,)),
        ):
            with pytest.raises(RequestError, match=str(token)):
                await answer(engine, wanted)
        with pytest.raises(RequestError, match=str(token)):
            await engine.logits((1, token))
        assert len(server.scheduler.seen) == sent

    run(go)


def test_a_request_beyond_the_servers_room_is_refused_and_not_shortened(
    engine: SglangServer, server: FakeSglangServer
) -> None:
    async def go() -> None:
        room = engine.info.max_context
        assert room == 256 - 7
        for ids, new in ((PROMPT, room), (PROMPT * 60, 1)):
            with pytest.raises(CapacityError, match=str(room)):
                await answer(engine, GenerationRequest(ids, SamplingParams(max_new_tokens=new)))
        with pytest.raises(CapacityError):
            await engine.logits(PROMPT * 60)
        whole = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=room - len(PROMPT)))
        assert len((await answer(engine, whole)).ids) == room - len(PROMPT)

    run(go)


def test_what_the_server_refuses_is_told_in_its_words_whole_or_inside_a_stream(
    server: FakeSglangServer, tiny_checkpoint: Path
) -> None:
    async def go() -> None:
        engine = connect(server, tiny_checkpoint)
        server.scheduler.context = 20  # as if another limit had been found at its start
        try:
            with pytest.raises(CapacityError, match="maximum context length of 20"):
                await answer(engine, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=30)))
            with pytest.raises(CapacityError, match="longer than the model's context length"):
                await engine.logits(PROMPT * 5)
        finally:
            server.scheduler.context = 256
        assert (await answer(engine, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=2)))).ids

    run(go)


def test_a_row_without_a_possible_token_ends_its_request_and_no_other(
    server: FakeSglangServer, tiny_checkpoint: Path
) -> None:
    async def go() -> None:
        engine = connect(server, tiny_checkpoint)
        impossible = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=4, min_new_tokens=1), (7,), (range(7, 8),))
        good = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=4))
        refused, given = await asyncio.gather(answer(engine, impossible), answer(engine, good), return_exceptions=True)
        assert isinstance(refused, DeclinedRequest)
        assert "no token is possible" in str(refused)
        assert not isinstance(given, BaseException)
        assert len(given.ids) == 4

    with pytest.MonkeyPatch.context() as patch:
        # The fake's own package is where the processor finds how SGLang gives a request up.
        patch.syspath_prepend(str(Path(__file__).parent / "fakes"))
        run(go)


def test_a_server_that_dies_in_the_middle_is_told_as_lost(tiny_checkpoint: Path) -> None:
    async def go(server: FakeSglangServer) -> None:
        engine = connect(server, tiny_checkpoint, "native")
        stream = engine.generate(GenerationRequest(PROMPT, SamplingParams(max_new_tokens=400)))
        await anext(stream)
        await asyncio.to_thread(server.http.kill)
        with pytest.raises(ServerLost):
            async for _ in stream:
                pass

    with FakeSglangServer(tiny_checkpoint) as server:
        run(lambda: go(server))


def test_a_server_without_hidden_states_or_a_folder_without_weights_gives_no_logits(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    with FakeSglangServer(tiny_checkpoint, enable_return_hidden_states=True) as server:
        engine = connect(server, tmp_path, "native")
        assert engine.info.capabilities == {"batch", "allowed", "chunked_prefill"}
        with pytest.raises(RequestError, match="no weights"):
            run(lambda: engine.logits(PROMPT))
    with FakeSglangServer(tiny_checkpoint) as server:
        engine = connect(server, tiny_checkpoint, "native")
        with pytest.raises(RequestError, match="--enable-return-hidden-states"):
            run(lambda: engine.logits(PROMPT))


def test_a_penalty_needs_a_server_that_knows_every_token_in_time(tiny_checkpoint: Path) -> None:
    with FakeSglangServer(tiny_checkpoint) as server:
        engine = connect(server, tiny_checkpoint, "native")
        wanted = GenerationRequest(PROMPT, SamplingParams(repetition_penalty=1.2), (), (range(10, 40),))
        with pytest.raises(DeclinedRequest, match="a token late"):
            run(lambda: answer(engine, wanted))


def test_the_rule_needs_a_server_that_takes_processors(tiny_checkpoint: Path) -> None:
    with (
        FakeSglangServer(tiny_checkpoint) as server,
        pytest.raises(BackendError, match="--enable-custom-logit-processor"),
    ):
        connect(server, tiny_checkpoint, "rule")


def test_another_vocabulary_is_found_out_before_a_prompt_is_sent(
    server: FakeSglangServer, config: LMConfig, tiny_checkpoint: Path
) -> None:
    async def opened(size: int) -> None:
        access = HttpServer(ServerAccess(server.url))
        expected = ExpectedModel(size, config.max_position_embeddings, frozenset(), "float32", tiny_checkpoint)
        try:
            await open_engine(access, ServerKind("sglang", ""), expected)
        finally:
            await access.close()

    for size, words in ((config.vocab_size - 1, "more"), (config.vocab_size + 1, "fewer")):
        with pytest.raises(BackendError, match=words):
            run(lambda size=size: opened(size))


def test_a_key_is_needed_where_the_server_has_one(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    with FakeSglangServer(tiny_checkpoint, key="secret") as server:
        with pytest.raises(BackendError, match="401"):
            connect(server, tiny_checkpoint, "native")
        engine = connect_server(tiny_checkpoint, "native", server.url, str(key), True, "auto", None)
        given = run(lambda: answer(engine, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=2))))
        assert len(given.ids) == 2
        monkeypatch.setenv("GPA_REMOTE_KEY", "secret")
        connect(server, tiny_checkpoint, "native")
        with pytest.raises(BackendError, match=r"key_file .*none: No such file"):
            connect_server(tiny_checkpoint, "native", server.url, str(tmp_path / "none"), True, "auto", None)


def test_what_a_fleet_asks(engine: SglangServer, torch_engine: Engine) -> None:
    async def ask() -> None:
        assert await engine.busy() == 0
        stream = engine.generate(GenerationRequest(PROMPT, SamplingParams(max_new_tokens=100)))
        await anext(stream)
        assert await engine.busy() == 1
        await stream.aclose()
        scores = await engine.top_scores(PROMPT, 5)
        row = (await torch_engine.logits(PROMPT))[-1]
        best = np.argsort(-row)[:5]
        assert list(scores) == best.tolist()
        gaps = np.array([scores[int(token)] for token in best]) - row[best]
        assert np.ptp(gaps) < 1e-4
        assert await engine.token_names((1, 2)) is None  # the fake has no tokenizer to ask

    run(ask)


def test_the_remote_backend_takes_sglang_servers(
    tiny_checkpoint: Path, torch_engine: Engine, server: FakeSglangServer
) -> None:
    async def both() -> None:
        engine = create_engine("remote", tiny_checkpoint, url=server.url, expect="none")
        wanted = [
            GenerationRequest(PROMPT, SamplingParams(max_new_tokens=8)),
            GenerationRequest(PROMPT, SamplingParams(max_new_tokens=8, repetition_penalty=1.3), (9,), (range(10, 40),)),
        ]
        given, expected = await answers(engine, wanted), await answers(torch_engine, wanted)
        assert [each.ids for each in given] == [each.ids for each in expected]
        assert "SGLang" in engine.info.note
        declined = GenerationRequest(PROMPT, SamplingParams(1.0, top_k=5, top_p=0.5, max_new_tokens=4))
        with pytest.raises(DeclinedRequest, match="top_k 5 and top_p"):
            await answer(engine, declined)
        await engine.close()

    run(both)


def test_a_server_says_that_it_is_sglang(server: FakeSglangServer) -> None:
    async def kind() -> ServerKind:
        access = HttpServer(ServerAccess(server.url))
        try:
            return await find_kind(access)
        finally:
            await access.close()

    assert run(kind).name == "sglang"


def test_an_answer_of_another_kind_of_server_is_no_sglang() -> None:
    with pytest.raises(BackendError, match="is it one"):
        SglangFacts.from_server_info({"version": "0.32.0"})


def test_failures_of_the_server_are_told_from_refusals(server: FakeSglangServer, tiny_checkpoint: Path) -> None:
    async def go() -> None:
        engine = connect(server, tiny_checkpoint, "native")
        stream = engine.generate(GenerationRequest(PROMPT, SamplingParams(max_new_tokens=100)))
        await anext(stream)
        server.scheduler.abort(next(iter(server.scheduler.running)))
        with pytest.raises(ServerRefused, match="gave the request up"):
            async for _ in stream:
                pass

    assert issubclass(ServerRefused, ServerError)
    run(go)
