"""Several servers behind one engine, over fakes: who is let in, where requests go, and what happens when one dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from gpa_codecs.errors import BackendError, CapacityError, DeclinedRequest, RequestError
from gpa_engines.engine import Engine, GenerationRequest, GivesRows, SamplingParams
from gpa_engines.fingerprint import FILE, Fingerprint
from gpa_engines.registry import create_engine
from gpa_engines.servers.http_server import MalformedAnswer, ServerRefused, ServerUnreachable, StalledStream
from gpa_engines.speech.loading import find_model
from tests.servers.asking import Answer, answer, request
from tests.servers.fake_http import Asked, FakeServer, Reply, events_reply, json_reply
from tests.servers.fake_vllm import FakeVllm, choice, event

PROMPT = (1, 2, 3)

Serve = Callable[..., FakeVllm]


def remote(folder: Path, *fakes: FakeServer, **options: Any) -> Any:
    return create_engine("remote", folder, **{"url": [fake.url for fake in fakes], "recheck": 0.1, **options})


def run(engine: Engine, main: Any) -> None:
    async def whole() -> None:
        try:
            await main()
        finally:
            await engine.close()

    asyncio.run(whole())


def served(fake: FakeVllm) -> int:
    return len(fake.streams)


def test_one_server_is_an_engine_that_several_loops_can_use(folder: Path, serve: Serve) -> None:
    fake = serve()
    engine = remote(folder, fake)
    assert isinstance(engine, Engine)
    assert isinstance(engine, GivesRows)
    info = engine.info
    assert (info.backend, info.device, info.dtype) == ("remote", fake.url, "bfloat16")
    assert (info.vocab_size, info.max_context) == (100, 64)
    assert info.note == "vLLM 0.32.0; weights not compared with the checkpoint's"
    for _ in range(2):
        given = asyncio.run(answer(engine, request(PROMPT, 7)))
        assert list(given.ids) == fake.answer(PROMPT, 7)
    asyncio.run(engine.close())
    with pytest.raises(RequestError, match="the engine is closed; create a new one"):
        asyncio.run(answer(engine, request(PROMPT, 7)))


def test_it_can_be_made_inside_an_event_loop(folder: Path, serve: Serve) -> None:
    fake = serve()

    async def main() -> None:
        engine = remote(folder, fake)
        assert len((await answer(engine, request(PROMPT, 3))).ids) == 3
        await engine.close()

    asyncio.run(main())


def test_a_folder_without_weights_is_enough(folder: Path) -> None:
    files = find_model(folder, backend="remote", parts=())
    assert (files.engine, files.codec) == (folder, None)


def test_requests_go_where_the_fewest_run_whoever_sent_them(folder: Path, serve: Serve) -> None:
    fakes = [serve(), serve(), serve()]
    fakes[0].others, fakes[1].others, fakes[2].others = 5, 0, 1
    for fake in fakes:
        fake.delay = 0.05
    engine = remote(folder, *fakes)

    async def main() -> None:
        given = await asyncio.gather(*(answer(engine, request(PROMPT, 8)) for _ in range(5)))
        assert [list(each.ids) for each in given] == [fakes[0].answer(PROMPT, 8)] * 5
        # Two open on the second and one on the third are as many as two with the other's one: then by chance.
        assert served(fakes[0]) == 0
        assert sorted([served(fakes[1]), served(fakes[2])]) == [2, 3]

    run(engine, main)


def test_the_first_request_of_many_processes_does_not_always_go_to_the_first_server(folder: Path, serve: Serve) -> None:
    fakes = [serve(), serve()]
    engine = remote(folder, *fakes)

    async def main() -> None:
        for _ in range(40):
            await answer(engine, request(PROMPT, 1))
        assert all(served(fake) > 5 for fake in fakes)

    run(engine, main)


def test_a_server_that_dies_fails_its_own_requests_and_is_taken_back_when_it_returns(
    folder: Path, serve: Serve
) -> None:
    fakes = [serve(), serve()]
    for fake in fakes:
        fake.delay = 0.1
    engine = remote(folder, *fakes)
    expected = fakes[0].answer(PROMPT, 10)

    async def main() -> None:
        running = [asyncio.create_task(answer(engine, request(PROMPT, 10))) for _ in range(8)]
        await asyncio.sleep(0.45)
        await asyncio.to_thread(fakes[0].kill)
        outcomes = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 20)
        lost = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
        kept = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
        assert (len(lost), len(kept)) == (4, 4)
        assert all(list(each.ids) == expected for each in kept)
        for error in lost:
            assert fakes[0].url in str(error)
            assert "had come; ask again for the whole" in str(error)
        before = served(fakes[1])
        for fake in fakes:
            fake.delay = 0.0
        assert [list((await answer(engine, request(PROMPT, 10))).ids) for _ in range(4)] == [expected] * 4
        assert served(fakes[1]) == before + 4, "nothing goes to the dead one"
        await asyncio.to_thread(fakes[0].start)
        before = served(fakes[0])
        for _ in range(100):
            await answer(engine, request(PROMPT, 2))
            if served(fakes[0]) > before:
                break
            await asyncio.sleep(0.05)
        assert served(fakes[0]) > before, "it is back"

    run(engine, main)


@pytest.mark.parametrize("how", ["refuses connections", "dies before a token", "is ill", "hangs"])
def test_a_request_that_has_given_nothing_begins_again_elsewhere(how: str, folder: Path, serve: Serve) -> None:
    fakes = [serve(), serve()]
    fakes[1].others = 50
    engine = remote(folder, *fakes, start_timeout=0.5)

    async def silent() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(30)
        yield event([1])

    async def nothing() -> AsyncGenerator[bytes, None]:
        if how == "hangs":
            await asyncio.sleep(30)
        yield b": nothing yet\n\n"

    async def plant(asked: Asked) -> Reply | None:
        if how == "is ill":
            return json_reply({"error": {"message": "engine dead"}}, 503)
        return Reply(silent() if how == "hangs" else nothing(), kind="text/event-stream", whole=False)

    fakes[0].planted = plant

    async def main() -> None:
        if how == "refuses connections":
            await asyncio.to_thread(fakes[0].kill)
        given = await asyncio.wait_for(answer(engine, request(PROMPT, 6)), 10)
        assert list(given.ids) == fakes[1].answer(PROMPT, 6)
        assert served(fakes[1]) == 1

    run(engine, main)


def test_a_request_tries_no_more_servers_than_told(folder: Path, serve: Serve) -> None:
    fakes = [serve() for _ in range(4)]
    engine = remote(folder, *fakes, tries=2)

    async def plant(asked: Asked) -> Reply | None:
        return json_reply({"error": {"message": "poison"}}, 500)

    for fake in fakes:
        fake.planted = plant

    async def main() -> None:
        with pytest.raises(RequestError, match=r"failed: .*refused with status 500: poison"):
            await answer(engine, request(PROMPT, 6))
        assert sum(map(served, fakes)) == 2

    run(engine, main)


def test_a_declined_request_is_no_failure_of_the_server(folder: Path, serve: Serve) -> None:
    fakes = [serve(), serve()]
    engine = remote(folder, *fakes)

    async def plant(asked: Asked) -> Reply | None:
        return json_reply({"error": {"message": "not so"}}, 400)

    async def main() -> None:
        fakes[0].planted = fakes[1].planted = plant
        with pytest.raises(DeclinedRequest, match="declined the request: not so"):
            await answer(engine, request(PROMPT, 6))
        with pytest.raises(DeclinedRequest, match="both given"):
            await answer(engine, request(PROMPT, 6, temperature=1.0, top_p=0.5, min_p=0.1))
        with pytest.raises(CapacityError, match="need 73 positions; the smallest server has 64: shorten the prompt"):
            await answer(engine, request(PROMPT, 70))
        with pytest.raises(RequestError, match=r"prompt_ids\[0\] is 100; the vocabulary has ids 0 to 99"):
            await answer(engine, request((100,), 2))
        fakes[0].planted = fakes[1].planted = None
        before = served(fakes[0]), served(fakes[1])
        assert sum(before) == 1
        for _ in range(2):
            assert len((await answer(engine, request(PROMPT, 6))).ids) == 6

    run(engine, main)


def test_all_servers_dead_is_said_at_once_and_the_next_request_finds_them_again(folder: Path, serve: Serve) -> None:
    fakes = [serve(), serve()]
    engine = remote(folder, *fakes)

    async def main() -> None:
        for fake in fakes:
            await asyncio.to_thread(fake.kill)
        for _ in range(2):
            with pytest.raises(RequestError) as caught:
                await asyncio.wait_for(answer(engine, request(PROMPT, 2)), 10)
            assert any(fake.url in str(caught.value) for fake in fakes)
        assert "no engine is left" in str(caught.value)
        assert "asked again with the next request" in str(caught.value)
        for fake in fakes:
            await asyncio.to_thread(fake.start)
        assert list((await answer(engine, request(PROMPT, 5))).ids) == fakes[0].answer(PROMPT, 5)

    run(engine, main)


def test_a_server_that_comes_back_with_other_weights_gets_nothing(folder: Path, serve: Serve) -> None:
    fakes = [serve(), serve()]
    engine = remote(folder, *fakes)

    async def main() -> None:
        await asyncio.to_thread(fakes[0].kill)
        fakes[0].weights = 1
        await asyncio.to_thread(fakes[0].start)
        for _ in range(10):
            given = await answer(engine, request(PROMPT, 4))
            await asyncio.sleep(0.05)
        # Its connection was found dead by a request or a look; since then it is examined and turned away.
        engine._members[0].failure = engine._members[0].failure or RuntimeError("seen as dead")
        before = served(fakes[0])
        for _ in range(10):
            given = await answer(engine, request(PROMPT, 4))
            assert list(given.ids) == fakes[1].answer(PROMPT, 4)
            await asyncio.sleep(0.05)
        assert served(fakes[0]) == before
        assert "does not hold the weights of" in str(engine._members[0].failure)

    run(engine, main)


def test_a_server_that_is_away_at_the_start_is_taken_in_when_it_comes(folder: Path, serve: Serve) -> None:
    first, late = serve(), serve()
    late.kill()
    engine = remote(folder, first, late)
    assert engine.info.device == f"{first.url},{late.url}"

    async def main() -> None:
        for _ in range(3):
            await answer(engine, request(PROMPT, 4))
        assert served(late) == 0
        await asyncio.to_thread(late.start)
        for _ in range(100):
            await answer(engine, request(PROMPT, 2))
            if served(late):
                break
            await asyncio.sleep(0.05)
        assert served(late)

    run(engine, main)


def test_other_weights_are_refused_naming_both(folder: Path, serve: Serve) -> None:
    one, other = serve(), serve(weights=1)
    with pytest.raises(BackendError, match="does not hold the weights of") as caught:
        remote(folder, one, other)
    assert one.url in str(caught.value)
    assert other.url in str(caught.value)
    assert "start every server with the same checkpoint" in str(caught.value)


def test_other_weights_than_recorded_are_refused_of_a_single_server(folder: Path, serve: Serve) -> None:
    right, wrong = serve(), serve(weights=1)

    async def record() -> Fingerprint:
        engine = remote(folder, right)
        try:
            member = engine._members[0].engine
            return await Fingerprint.take(member._engine)
        finally:
            await engine.close()

    asyncio.run(record()).write(folder / FILE)
    engine = remote(folder, right)
    assert engine.info.note == f"vLLM 0.32.0; weights compared with {folder / FILE}"
    asyncio.run(engine.close())
    with pytest.raises(BackendError, match=f"{wrong.url} does not hold the weights of .*fingerprint.json"):
        remote(folder, wrong)
    engine = remote(folder, wrong, expect="none")
    asyncio.run(engine.close())


def test_other_vocabularies_are_refused(folder: Path, serve: Serve) -> None:
    with pytest.raises(BackendError, match="vocabulary is larger than the 100 ids of the model's folder"):
        remote(folder, serve(vocabulary=101))
    with pytest.raises(
        BackendError, match=r"has another vocabulary: its id 40 is 'x40', the model folder's is '<\|40\|>'"
    ):
        remote(folder, serve(names=lambda token: f"x{token}"))


def test_servers_that_are_started_otherwise_are_refused(folder: Path, serve: Serve) -> None:
    with pytest.raises(BackendError, match=r"has dtype bfloat16, http.* has float32: start all servers alike"):
        remote(folder, serve(full=True), serve())


def test_servers_of_several_sizes_offer_what_all_have_and_a_later_one_must_have_it(folder: Path, serve: Serve) -> None:
    large, small = serve(room=64), serve(room=48)
    engine = remote(folder, large, small)
    assert engine.info.max_context == 48

    async def main() -> None:
        large.kill()
        while engine._members[0].failure is None:
            assert list((await answer(engine, request(PROMPT, 40))).ids) == small.answer(PROMPT, 40)
        large.room = 32
        large.start()
        small.kill()
        for message in ("is the server running", "room for 32 positions and lacks nothing .* have room for 48"):
            with pytest.raises(RequestError, match=message):
                await asyncio.wait_for(answer(engine, request(PROMPT, 40)), 10)

    run(engine, main)


def test_what_is_no_such_server_is_refused(folder: Path, serve: Serve) -> None:
    async def page(asked: Asked) -> Reply:
        return Reply(b"<html>It works!</html>", kind="text/html")

    with FakeServer(page) as website, pytest.raises(BackendError, match="is neither a vLLM nor an SGLang server"):
        remote(folder, website)
    with pytest.raises(ServerUnreachable, match=r"cannot be reached: .*is the server running"):
        create_engine("remote", folder, url="http://127.0.0.1:9")
    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:9 .*; .*127\.0\.0\.1:7 "):
        create_engine("remote", folder, url="http://127.0.0.1:9,http://127.0.0.1:7")
    with pytest.raises(ServerRefused, match="401: Unauthorized: the server asks for a key; set GPA_REMOTE_KEY"):
        remote(folder, serve(key="secret"))
    with pytest.raises(BackendError, match="serves no model 'other'"):
        remote(folder, serve(), served_name="other")


def test_a_server_that_hangs_at_the_start_is_not_waited_for(folder: Path) -> None:
    async def hang(asked: Asked) -> Reply:
        await asyncio.sleep(30)
        return json_reply({})

    with FakeServer(hang) as fake, pytest.raises(StalledStream, match=r"has not answered within 0.3 s"):
        remote(folder, fake, connect_timeout=0.3)


def test_a_wrong_key_is_said_and_the_right_one_is_taken(
    folder: Path, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = serve(key="secret")
    file = tmp_path / "key"
    file.write_text("wrong-key\n")
    with pytest.raises(ServerRefused, match="the key that was sent is not the server's") as caught:
        remote(folder, fake, key_file=file)
    assert "wrong-key" not in str(caught.value)
    monkeypatch.setenv("GPA_REMOTE_KEY", "secret")
    engine = remote(folder, fake)
    assert len(asyncio.run(answer(engine, request(PROMPT, 3))).ids) == 3
    asyncio.run(engine.close())


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda: events_reply(choice([5]), b"{broken"), "event 1: not JSON"),
        (lambda: events_reply(choice([5]), choice([777])), "id 777 is outside the vocabulary of 100"),
    ],
)
def test_a_malformed_stream_fails_after_what_was_right(
    reply: Callable[[], Reply], message: str, folder: Path, serve: Serve
) -> None:
    fake = serve()
    engine = remote(folder, fake)

    async def plant(asked: Asked) -> Reply | None:
        return reply()

    async def main() -> None:
        fake.planted = plant
        deltas = engine.generate(request(PROMPT, 4))
        assert (await anext(deltas)).ids == (5,)
        with pytest.raises(RequestError, match=f"{message}.*1 token had come"):
            await anext(deltas)

    run(engine, main)


def test_closing_ends_what_runs_on_every_server(folder: Path, serve: Serve) -> None:
    fakes = [serve(), serve()]
    for fake in fakes:
        fake.delay = 0.1
    engine = remote(folder, *fakes)

    async def main() -> None:
        running = [asyncio.create_task(answer(engine, request(PROMPT, 50))) for _ in range(4)]
        await asyncio.sleep(0.5)
        await engine.close()
        given = await asyncio.wait_for(asyncio.gather(*running), 10)
        assert [each.finish_reason for each in given] == ["cancelled"] * 4

    run(engine, main)


def test_logits_come_from_any_server_that_gives_them(folder: Path, serve: Serve) -> None:
    fakes = [serve(full=True), serve(full=True)]
    engine = remote(folder, *fakes)
    assert "logits" in engine.info.capabilities

    async def main() -> None:
        rows = await engine.logits(PROMPT)
        assert rows.argmax(axis=1).tolist() == [fakes[0].next_id(PROMPT[: end + 1]) for end in range(3)]
        await asyncio.to_thread(fakes[0].kill)
        for _ in range(4):
            assert (await engine.logits_at(PROMPT, (1,)) == rows[1]).all()

    run(engine, main)


def test_a_server_without_models_says_so(folder: Path) -> None:
    class Odd(FakeVllm):
        async def _handle(self, asked: Asked) -> Reply:
            if asked.path == "/v1/models":
                return json_reply({"data": [{"owned_by": "vllm"}]})
            return await super()._handle(asked)

    with Odd() as fake, pytest.raises(MalformedAnswer, match="lists no model as vLLM does"):
        remote(folder, fake)


def test_a_minimum_of_tokens_holds_back_no_other_id(folder: Path, serve: Serve) -> None:
    fake = serve()
    engine = remote(folder, fake)
    stop = fake.answer(PROMPT, 1)[0]

    async def main() -> None:
        sampling = SamplingParams(max_new_tokens=6, min_new_tokens=2)
        await answer(engine, GenerationRequest(PROMPT, sampling, (stop,)))
        assert [asked.json["min_tokens"] for asked in fake.streams] == [0, 0]
        await answer(engine, GenerationRequest(PROMPT, sampling, (stop, 50, 51, 52)))
        assert [asked.json["min_tokens"] for asked in fake.streams][2:] == [2]

    run(engine, main)
