"""One vLLM server as an engine, over a fake of the recorded shapes; tests/backends/remote has the real one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import BackendError, CapacityError, DeclinedRequest, RequestError

pytest.importorskip("httpx", reason="needs httpx")

from gpa_engines.engine import Engine, GenerationRequest, GivesRows, SamplingParams
from gpa_engines.servers.http_server import (
    HttpServer,
    MalformedAnswer,
    MalformedStream,
    ServerAccess,
    ServerError,
    ServerLost,
    ServerRefused,
)
from gpa_engines.servers.kind import ExpectedModel, ServerEngine, open_server
from tests.servers.asking import answer, request
from tests.servers.fake_http import Asked, Reply, events_reply, json_reply
from tests.servers.fake_vllm import MODEL, VOCABULARY, FakeVllm, choice, event

PROMPT = (1, 2, 3)


def expected(**other: Any) -> ExpectedModel:
    facts = {
        "vocab_size": VOCABULARY,
        "max_context": 32768,
        "end_ids": frozenset((50,)),
        "dtype": "auto",
        "folder": Path(),
    }
    return ExpectedModel(**{**facts, **other})


def use(
    fake: FakeVllm, main: Callable[[ServerEngine], Awaitable[None]], model: ExpectedModel | None = None, **access: Any
) -> None:
    """Run `main` on an engine over the fake."""

    async def run(url: str) -> None:
        engine = await open_server(HttpServer(ServerAccess(url, **access)), model or expected())
        try:
            await main(engine)
        finally:
            await engine.close()

    with fake:
        asyncio.run(run(fake.url))


def test_an_answer_is_streamed_and_every_field_is_sent() -> None:
    fake = FakeVllm()

    async def main(engine: ServerEngine) -> None:
        assert isinstance(engine, Engine)
        assert isinstance(engine, ServerEngine)
        assert isinstance(engine, GivesRows)
        info = engine.info
        assert (info.backend, info.device, info.dtype) == ("remote", fake.url, "auto")
        assert (info.vocab_size, info.max_context, info.note) == (VOCABULARY, 64, "vLLM 0.32.0")
        assert info.capabilities == {"batch", "allowed", "seed"}
        given = await answer(engine, request(PROMPT, 7))
        assert list(given.ids) == fake.answer(PROMPT, 7)
        assert given.finish_reason == "length"
        sent = fake.streams[0].json
        assert sent["prompt"] == [1, 2, 3]
        assert sent["model"] == MODEL
        assert (sent["return_token_ids"], sent["stream"], sent["ignore_eos"]) == (True, True, True)
        assert (sent["max_tokens"], sent["temperature"], sent["watermarking"]) == (7, 0.0, False)

    use(fake, main)


def test_the_stop_id_ends_the_answer_and_is_not_part_of_it() -> None:
    fake = FakeVllm()
    whole = fake.answer(PROMPT, 9)

    async def main(engine: ServerEngine) -> None:
        stop = whole[4]
        first = whole.index(stop)
        given = await answer(engine, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=9), (stop,)))
        assert (list(given.ids), given.finish_reason) == (whole[:first], "stop")
        assert given.usage is not None
        assert given.usage.new_tokens == first
        wanted = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=9), (whole[0],))
        nothing = await answer(engine, wanted)
        assert (nothing.ids, nothing.finish_reason) == ((), "stop")

    use(fake, main)


def test_a_seed_is_reported_whether_it_was_given_or_not() -> None:
    fake = FakeVllm()

    async def main(engine: ServerEngine) -> None:
        given = await answer(engine, GenerationRequest(PROMPT, SamplingParams(1.0, max_new_tokens=2, seed=17)))
        drawn = await answer(engine, GenerationRequest(PROMPT, SamplingParams(1.0, max_new_tokens=2)))
        assert given.usage is not None
        assert drawn.usage is not None
        assert given.usage.seed == 17 == fake.streams[0].json["seed"]
        assert drawn.usage.seed == fake.streams[1].json["seed"]
        assert (given.usage.prompt_tokens, given.usage.queue) == (3, 0.0)
        assert given.usage.prefill > 0

    use(fake, main)


def test_a_minimum_of_tokens_is_kept_with_and_without_a_request_of_its_own() -> None:
    fake = FakeVllm()

    async def main(engine: ServerEngine) -> None:
        stop = fake.answer(PROMPT, 1)[0]
        sampling = SamplingParams(max_new_tokens=9, min_new_tokens=4)
        held = await answer(engine, GenerationRequest(PROMPT, sampling, (stop,)))
        assert len(held.ids) >= 4
        first, rest = (asked.json for asked in fake.streams)
        assert (first["max_tokens"], first["min_tokens"], first["stop_token_ids"]) == (4, 0, [])
        assert set(first["allowed_token_ids"]) == set(range(VOCABULARY)) - {stop}
        assert rest["prompt"] == [*PROMPT, *held.ids[:4]]
        assert (rest["max_tokens"], rest["min_tokens"], rest["stop_token_ids"]) == (5, 0, [stop])
        all_ = await answer(
            engine, GenerationRequest(PROMPT, SamplingParams(max_new_tokens=4, min_new_tokens=4), (stop,))
        )
        assert (all_.ids, all_.finish_reason) == (held.ids[:4], "length")
        fake.asked.clear()
        await answer(engine, GenerationRequest(PROMPT, sampling, (stop, 50)))
        assert [asked.json["min_tokens"] for asked in fake.streams] == [4], "50 is the model's own end"

    use(fake, main)


def test_what_cannot_be_served_is_declined_before_anything_is_sent() -> None:
    fake = FakeVllm(room=20)

    async def main(engine: ServerEngine) -> None:
        sent = len(fake.asked)
        for wanted, error, message in (
            (request((1, VOCABULARY), 2), RequestError, r"ids\[1\] is 100; the vocabulary has ids 0 to 99"),
            (
                GenerationRequest(PROMPT, stop_ids=(100,), sampling=SamplingParams(max_new_tokens=1)),
                RequestError,
                "stop_ids",
            ),
            (request(PROMPT, 18), CapacityError, r"need 21 positions; http.* has 20: .* a larger --max-model-len"),
            (
                GenerationRequest(PROMPT, SamplingParams(0.001, max_new_tokens=1)),
                DeclinedRequest,
                "temperature is 0.001",
            ),
        ):
            with pytest.raises(error, match=message):
                await answer(engine, wanted)
        with pytest.raises(
            DeclinedRequest, match="gives no logits; start it with --max-logprobs -1 --logprobs-mode raw"
        ):
            await engine.logits(PROMPT)
        assert len(fake.asked) == sent
        assert len((await answer(engine, request(PROMPT, 17))).ids) == 17

    use(fake, main)


async def _died() -> AsyncGenerator[bytes, None]:
    yield event([5])
    yield event([6])


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (lambda: Reply(_died(), kind="text/event-stream", whole=False), ServerLost, "broke off its answer"),
        (lambda: Reply(_died(), kind="text/event-stream"), ServerLost, r"after event 2, without \[DONE\]"),
        (lambda: events_reply(choice([5])), MalformedStream, "ended an answer without saying why"),
        (lambda: events_reply(choice([5], "abort")), ServerLost, "it is shutting down"),
        (lambda: events_reply(choice([5], "error")), ServerLost, "its finish_reason is 'error'"),
        (lambda: events_reply(choice(None)), MalformedStream, "sends no token_ids; .* needs vLLM 0.10.2"),
        (lambda: events_reply(choice([5, 777])), MalformedStream, "id 777 is outside the vocabulary"),
        (lambda: events_reply(choice([5], "length")), MalformedStream, "cut it off after 1 of 4 ids"),
        (lambda: events_reply(choice([5, 6, 7, 8], "length"), choice([9])), MalformedStream, "more ids after the end"),
        (lambda: events_reply({"error": {"message": "EngineCore died"}}), ServerLost, "broke off .*: EngineCore died"),
        (lambda: events_reply({"choices": [{}, {}]}), MalformedStream, "an event that is no completion"),
        (lambda: events_reply(["what"]), MalformedStream, "an event that is no completion"),
        (lambda: events_reply(b"not json"), MalformedStream, "event 0: not JSON"),
        (lambda: json_reply({"error": {"message": "dead"}}, 500), ServerRefused, "refused with status 500: dead"),
        (lambda: json_reply({"error": {"message": "bad"}}, 400), DeclinedRequest, "^http.* declined the request: bad"),
    ],
)
def test_a_wrong_stream_is_an_error_and_no_token_is_made_up(
    reply: Callable[[], Reply], error: type[RequestError], message: str
) -> None:
    fake = FakeVllm()

    async def plant(asked: Asked) -> Reply:
        return reply()

    async def main(engine: ServerEngine) -> None:
        fake.planted = plant
        with pytest.raises(error, match=message):
            await answer(engine, request(PROMPT, 4))
        fake.planted = None
        assert list((await answer(engine, request(PROMPT, 4))).ids) == fake.answer(PROMPT, 4), "the engine goes on"

    use(fake, main)


def test_closing_ends_what_runs_and_nothing_runs_after() -> None:
    fake = FakeVllm()
    fake.delay = 0.1

    async def main(engine: ServerEngine) -> None:
        running = asyncio.create_task(answer(engine, request(PROMPT, 50)))
        await asyncio.sleep(0.5)
        await engine.close()
        given = await asyncio.wait_for(running, 5)
        assert given.finish_reason == "cancelled"
        assert list(given.ids) == fake.answer(PROMPT, 50)[: len(given.ids)]
        with pytest.raises(RequestError, match="the engine is closed; create a new one"):
            await answer(engine, request(PROMPT, 2))
        await engine.close()

    use(fake, main)


def test_leaving_a_stream_early_stops_the_server() -> None:
    fake = FakeVllm()
    fake.delay = 0.02

    async def main(engine: ServerEngine) -> None:
        async with aclosing(engine.generate(request(PROMPT, 50))) as deltas:
            assert (await anext(deltas)).ids
        fake.delay = 0.0
        assert list((await answer(engine, request(PROMPT, 4))).ids) == fake.answer(PROMPT, 4)

    use(fake, main)


def test_the_load_is_everybodys_and_an_ill_server_has_none() -> None:
    fake = FakeVllm()

    async def main(engine: ServerEngine) -> None:
        fake.others = 7
        assert await engine.busy() == 7
        fake.healthy = False
        with pytest.raises(ServerError, match="/health refused with status 503"):
            await engine.busy()

    use(fake, main)


def test_logits_are_whole_rows_where_the_server_was_started_for_them() -> None:
    fake = FakeVllm(full=True)

    async def main(engine: ServerEngine) -> None:
        assert engine.info.capabilities == {"batch", "allowed", "seed", "logits"}
        assert engine.info.dtype == "float32", "seen in the values"
        rows = await engine.logits(PROMPT)
        assert rows.shape == (3, VOCABULARY)
        assert rows.dtype == np.float32
        assert rows.argmax(axis=1).tolist() == [fake.next_id(PROMPT[: end + 1]) for end in range(3)]
        assert isinstance(engine, GivesRows)
        np.testing.assert_array_equal(await engine.logits_at(PROMPT, (0, 2)), rows[[0, 2]])
        assert (await engine.logits_at(PROMPT, ())).shape == (0, VOCABULARY)
        for ids, positions, message in (
            ((), (), "ids is empty"),
            (PROMPT, (1, 1), "strictly ascending"),
            ((-1,), (0,), "-1"),
        ):
            with pytest.raises(RequestError, match=message):
                await engine.logits_at(ids, positions)
        top = await engine.top_scores(PROMPT, 5)
        assert len(top) == 5
        assert max(top, key=top.__getitem__) == fake.next_id(PROMPT)
        assert await engine.token_names((3, 4)) == ["<|3|>", "<|4|>"]

    use(fake, main)


def test_normalised_rows_are_not_taken_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm(full=True)
    plain = fake._complete

    async def normalised(asked: Asked) -> Reply:
        reply = await plain(asked)
        if asked.json.get("logprobs"):
            assert isinstance(reply.parts, bytes)
            value = Asked("", "", {}, reply.parts).json
            top = value["choices"][0]["logprobs"]["top_logprobs"][0]
            total = math.log(sum(map(math.exp, top.values())))
            value["choices"][0]["logprobs"]["top_logprobs"] = [{name: score - total for name, score in top.items()}]
            return json_reply(value)
        return reply

    monkeypatch.setattr(fake, "_complete", normalised)

    async def main(engine: ServerEngine) -> None:
        assert "logits" not in engine.info.capabilities

    use(fake, main)


@pytest.mark.parametrize(
    ("fake", "model", "error", "message"),
    [
        (
            FakeVllm(vocabulary=101),
            {},
            BackendError,
            "whose vocabulary is larger than the 100 ids of the model's folder",
        ),
        (
            FakeVllm(vocabulary=99),
            {},
            BackendError,
            "vocabulary is smaller than the 100 ids .* give the folder that it",
        ),
        (FakeVllm(), {"served_name": "other"}, BackendError, "serves no model 'other'; it serves '/models/gpa'"),
        (FakeVllm(room=0), {}, MalformedAnswer, "lists no model as vLLM does"),
    ],
)
def test_another_model_is_refused(
    fake: FakeVllm, model: dict[str, Any], error: type[RequestError], message: str
) -> None:
    async def main(engine: ServerEngine) -> None:
        raise AssertionError("it was taken")

    with pytest.raises(error, match=message):
        use(fake, main, expected(**model))


def test_a_server_in_a_coarser_dtype_than_said_is_refused() -> None:
    async def main(engine: ServerEngine) -> None:
        assert engine.info.dtype == "bfloat16"

    use(FakeVllm(full=True), main, expected(dtype="bfloat16"))

    class Coarse(FakeVllm):
        def __init__(self) -> None:
            super().__init__(full=True, vocabulary=25)

    # A row of 25 eighths is exact in bfloat16.
    fake = Coarse()
    plain = fake._complete

    async def rounded(asked: Asked) -> Reply:
        reply = await plain(asked)
        value = Asked("", "", {}, reply.parts).json if isinstance(reply.parts, bytes) else None
        if value is not None and asked.json.get("logprobs"):
            top = value["choices"][0]["logprobs"]["top_logprobs"][0]
            value["choices"][0]["logprobs"]["top_logprobs"] = [{n: round(s * 8) / 8 for n, s in top.items()}]
            return json_reply(value)
        return reply

    fake._complete = rounded  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="computes in bfloat16, not in float32: start it with --dtype float32"):
        use(fake, main, expected(vocab_size=25, dtype="float32"))
