"""Which kind of server answers, and what is said of one that is none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gpa_codecs.errors import BackendError

pytest.importorskip("httpx", reason="needs httpx")

from gpa_engines.servers.http_server import HttpServer, ServerAccess, ServerRefused
from gpa_engines.servers.kind import ServerKind, find_kind
from tests.servers.fake_http import Asked, FakeServer, Reply, json_reply
from tests.servers.fake_vllm import FakeVllm


def kind_of(answers: dict[str, Any] | FakeServer) -> ServerKind:
    """Of a server that answers JSON at these paths; bytes are sent as a page."""

    async def handler(asked: Asked) -> Reply:
        assert isinstance(answers, dict)
        if (answer := answers.get(asked.path, answers.get("*"))) is None:
            return json_reply({"detail": "Not Found"}, 404)
        return Reply(answer, kind="text/html") if isinstance(answer, bytes) else json_reply(answer)

    async def find(url: str) -> ServerKind:
        server = HttpServer(ServerAccess(url))
        try:
            return await find_kind(server)
        finally:
            await server.close()

    with answers if isinstance(answers, FakeServer) else FakeServer(handler) as fake:
        return asyncio.run(find(fake.url))


def models(owner: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": "m", "owned_by": owner}]}


def test_vllm_and_sglang_are_known() -> None:
    assert kind_of(FakeVllm()) == ServerKind("vllm", "0.32.0")
    sglang = {
        "/v1/models": models("sglang"),
        "/get_model_info": {"model_path": "/m"},
        "/server_info": {"version": "0.5"},
    }
    assert kind_of(sglang) == ServerKind("sglang", "0.5")
    assert kind_of({"/model_info": {"model_path": "/m"}}) == ServerKind("sglang", "")


@pytest.mark.parametrize(
    ("answers", "seen"),
    [
        ({"*": b"<html>It works!</html>"}, "/v1/models is not JSON; "),
        ({}, "/v1/models has status 404"),
        ({"/v1/models": models("llamacpp")}, "its models are owned by 'llamacpp'"),
        ({"/v1/models": models("vllm")}, "its models are owned by 'vllm'"),
        ({"/v1/models": {"data": []}, "/version": {"version": "1"}, "*": {}}, "it has no models"),
        ({"*": ["anything"]}, "it has no models"),
    ],
)
def test_every_other_server_is_refused_with_what_was_seen(answers: dict[str, Any], seen: str) -> None:
    with pytest.raises(BackendError, match=r"is neither a vLLM nor an SGLang server") as caught:
        kind_of(answers)
    assert seen in str(caught.value)
    assert "docs/serving_many_machines.md" in str(caught.value)


def test_a_wrong_key_is_not_taken_for_a_wrong_server() -> None:
    with pytest.raises(ServerRefused, match="401: Unauthorized: the server asks for a key; set GPA_REMOTE_KEY"):
        kind_of(FakeVllm(key="secret"))
