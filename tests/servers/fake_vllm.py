"""A fake vLLM server: the shapes of vLLM 0.32.0 as they were recorded, over a model that is a formula."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from tests.servers.fake_http import Asked, FakeServer, Reply, json_reply

VOCABULARY = 100
MODEL = "/models/gpa"

Planted = Callable[[Asked], Awaitable[Reply | None]]


class FakeVllm(FakeServer):
    """weights: another number is another model. full: started with --max-logprobs -1 --logprobs-mode raw_logits.

    planted: is asked first about every request for an answer that streams; None lets the server answer. others:
    requests of other people, as /metrics counts them. delay: seconds before every token of a stream.
    """

    def __init__(
        self,
        *,
        weights: int = 0,
        vocabulary: int = VOCABULARY,
        room: int = 64,
        key: str | None = None,
        full: bool = False,
        names: Callable[[int], str] = lambda token: f"<|{token}|>",
    ) -> None:
        super().__init__(self._handle)
        self.weights, self.vocabulary, self.room, self.key, self.full = weights, vocabulary, room, key, full
        self.names = names
        self.planted: Planted | None = None
        self.others = 0
        self.delay = 0.0
        self.healthy = True

    @property
    def streams(self) -> list[Asked]:
        """Requests for answers that stream."""
        return [asked for asked in self.asked if asked.path == "/v1/completions" and asked.json.get("stream")]

    def next_id(self, sequence: Sequence[int], possible: Sequence[int] | None = None) -> int:
        """Greedy, after a prompt and an answer so far."""
        choices = possible or range(self.vocabulary)
        return choices[(sum(sequence) * 31 + len(sequence) * 7 + self.weights * 13) % len(choices)]

    def answer(self, prompt: Sequence[int], count: int) -> list[int]:
        sequence = list(prompt)
        for _ in range(count):
            sequence.append(self.next_id(sequence))
        return sequence[len(prompt) :]

    async def _handle(self, asked: Asked) -> Reply:
        if asked.path == "/version":
            return json_reply({"version": "0.32.0"})
        if asked.path == "/health":
            return Reply(b"", 200 if self.healthy else 503)
        if asked.path == "/metrics":
            gauge = 'vllm:num_requests_{}{{engine="0",model_name="gpa"}} {}.0\n'
            text = "# TYPE vllm:num_requests_running gauge\n" + gauge.format("running", self.others)
            return Reply((text + gauge.format("waiting", 0)).encode(), kind="text/plain")
        if self.key is not None and asked.headers.get("authorization") != f"Bearer {self.key}":
            return json_reply({"error": "Unauthorized"}, 401)
        if asked.path == "/v1/models":
            model = {"id": MODEL, "object": "model", "owned_by": "vllm", "parent": None, "max_model_len": self.room}
            return json_reply({"object": "list", "data": [model]})
        if asked.path == "/detokenize":
            return json_reply({"prompt": "".join(map(self.names, asked.json["tokens"]))})
        if asked.path == "/v1/completions":
            return await self._complete(asked)
        return json_reply({"detail": "Not Found"}, 404)

    async def _complete(self, asked: Asked) -> Reply:
        wanted = asked.json
        if wanted.get("stream") and self.planted is not None and (reply := await self.planted(asked)) is not None:
            return reply
        if any(token >= self.vocabulary for token in wanted["stop_token_ids"]):
            return self._wrong("stop_token_ids contain out-of-vocab token ids", "stop_token_ids")
        if not self.full and not 0 <= (wanted.get("logprobs") or 0) <= 20:
            return self._wrong("Requested sample logprobs, which is greater than max allowed: 20", "logprobs")
        if wanted.get("stream"):
            return Reply(self._stream(wanted), kind="text/event-stream; charset=utf-8")
        best = self.next_id(wanted["prompt"])
        scores = {f"token_id:{(best + step) % self.vocabulary}": 3.0 - step / 9 for step in range(self.vocabulary)}
        if wanted.get("logprobs") not in (None, -1):
            scores = dict(list(scores.items())[: wanted["logprobs"]])
        logprobs = {"top_logprobs": [scores]} if wanted.get("logprobs") else None
        choice = {"index": 0, "token_ids": [best], "finish_reason": "length", "logprobs": logprobs}
        return json_reply({"object": "text_completion", "choices": [choice]})

    async def _stream(self, wanted: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        sequence = list(wanted["prompt"])
        for index in range(wanted["max_tokens"]):
            await asyncio.sleep(self.delay)
            possible = wanted["allowed_token_ids"] or range(self.vocabulary)
            if index < wanted["min_tokens"]:
                possible = [token for token in possible if token not in wanted["stop_token_ids"]]
            sequence.append(self.next_id(sequence, possible))
            reason = "stop" if sequence[-1] in wanted["stop_token_ids"] else None
            if index == wanted["max_tokens"] - 1:
                reason = reason or "length"
            yield event(sequence[-1:], reason)
            if reason:
                break
        yield b"data: [DONE]\n\n"

    def _wrong(self, message: str, param: str) -> Reply:
        return json_reply({"error": {"message": message, "type": "BadRequestError", "param": param, "code": 400}}, 400)


def choice(ids: Any, reason: str | None = None) -> dict[str, Any]:
    """What one event holds, as JSON."""
    text = {"index": 0, "text": "<|x|>", "logprobs": None, "finish_reason": reason, "stop_reason": None}
    return {"object": "text_completion", "choices": [{**text, "prompt_token_ids": None, "token_ids": ids}]}


def event(ids: Any, reason: str | None = None) -> bytes:
    return b"data: " + json.dumps(choice(ids, reason)).encode() + b"\n\n"
