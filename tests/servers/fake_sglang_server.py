"""A fake SGLang server on loopback: `fake_scheduler` behind the paths, statuses and bodies that were recorded."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gpa_engines.step_model import SlotRequest, StepRow
from tests.servers.fake_http import Asked, FakeServer, Reply, events_reply, json_reply
from tests.servers.fakes.fake_scheduler import VERSION, FakeArguments, FakeScheduler


class FakeSglangServer:
    """Serves a checkpoint; `http` is the server, `scheduler` what is behind it."""

    def __init__(self, model: Path, *, key: str | None = None, tokenizer: bool = True, **arguments: Any) -> None:
        self.scheduler = FakeScheduler(FakeArguments(str(model), skip_tokenizer_init=not tokenizer, **arguments))
        self.http = FakeServer(self.handle)
        self.key = key
        self.open_streams = 0

    @property
    def url(self) -> str:
        return self.http.url

    def __enter__(self) -> FakeSglangServer:
        self.http.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.kill()

    async def handle(self, asked: Asked) -> Reply:
        if self.key is not None and asked.headers.get("authorization") != f"Bearer {self.key}":
            return json_reply({"error": "Unauthorized"}, 401)
        path = asked.path.partition("?")[0]
        if path == "/generate":
            return await self.generate(asked)
        if path == "/server_info":
            return json_reply(self.scheduler.server_info() | {"frontend": "python"})
        if path == "/model_info":
            return json_reply({"model_path": self.scheduler.arguments.model_path, "is_generation": True})
        if path == "/v1/models":
            return json_reply({"object": "list", "data": [{"id": "gpa", "owned_by": "sglang"}]})
        if path == "/v1/loads":
            running = len(self.scheduler.running)
            return json_reply({"version": VERSION, "loads": [{"num_running_reqs": running, "num_waiting_reqs": 0}]})
        if path == "/abort_request":
            self.scheduler.abort(asked.json["rid"])
            return Reply()
        return json_reply({"detail": "Not Found"}, 404)

    async def generate(self, asked: Asked) -> Reply:
        body = asked.json
        try:
            request = self.scheduler.admit(body)
        except TypeError as error:
            # The contract check, before the request is looked at.
            return json_reply({"error": f"unknown field {str(error).rpartition(' ')[2]}"}, 400)
        except ValueError as error:
            if body.get("stream"):
                details = {"message": str(error), "type": "invalid_request_error", "code": 400, "retryable": False}
                return events_reply({"error": details})
            return json_reply({"error": {"message": str(error)}}, 400)
        chunks = self.scheduler.run(request, body)
        if not body.get("stream"):
            last: dict[str, Any] = {}
            async for chunk in chunks:
                last = chunk
            if body.get("return_logprob"):
                last["meta_info"]["output_top_logprobs"] = [self._top(body)]
            return json_reply(last)
        return Reply(self._events(chunks), kind="text/event-stream; charset=utf-8")

    async def _events(self, chunks: Any) -> AsyncGenerator[bytes, None]:
        self.open_streams += 1
        try:
            async for chunk in chunks:
                yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
        finally:
            self.open_streams -= 1
            with suppress(RuntimeError):
                await chunks.aclose()

    def _top(self, body: dict[str, Any]) -> list[tuple[float, int, None]]:
        model = self.scheduler.model
        slot = model.allocate(SlotRequest(len(body["input_ids"]), body["input_ids"]))
        assert slot is not None
        (row,) = model.logits(model.hidden(StepRow(slot.number, body["input_ids"], 0, "none"))[-1:])
        model.release(slot.number)
        row = row - np.log(np.exp(row.astype(np.float64)).sum())
        best = np.argsort(-row)[: body["top_logprobs_num"]]
        return [(float(row[token]), int(token), None) for token in best]
