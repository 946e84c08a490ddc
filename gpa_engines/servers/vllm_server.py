"""An engine over one vLLM server: its OpenAI completions with token ids in and out (vLLM 0.10.2 and later).

Nothing of vLLM is installed here. The shapes were recorded from vLLM 0.32.0.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, CapacityError, DeclinedRequest, RequestError
from gpa_engines.engine import (
    Capability,
    EngineInfo,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenDelta,
    check_ids,
    check_positions,
)
from gpa_engines.servers.answer_reader import AnswerReader
from gpa_engines.servers.clock import RequestClock
from gpa_engines.servers.http_server import (
    HttpServer,
    MalformedAnswer,
    MalformedStream,
    ServerError,
    ServerLost,
    ServerRefused,
)
from gpa_engines.servers.kind import ExpectedModel, ServerKind
from gpa_engines.servers.score_rows import coarsest_dtype, full_row, is_log_probabilities, scores_by_id
from gpa_engines.servers.vllm_fields import after_minimum, until_minimum, vllm_fields

COMPLETIONS = "/v1/completions"

API_FIELDS = {
    "echo": False,
    "add_special_tokens": False,
    "truncate_prompt_tokens": None,
    "use_beam_search": False,
    "watermarking": False,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
"""Fields that the HTTP API has beside those of the sampling."""

CAPABILITIES: frozenset[Capability] = frozenset(("batch", "allowed", "seed"))
"""Whether long prompts are read in chunks depends on how the server was started, and does not show."""

USUAL_MAX_LOGPROBS = 20
"""vLLM's --max-logprobs where nobody sets it."""

ROWS_AT_A_TIME = 4
"""Rows of logits that are asked for together; one of the released vocabulary is 10 MB of JSON."""

_COUNTS = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.eE+]+)$", re.MULTILINE)


async def open_engine(server: HttpServer, kind: ServerKind, expected: ExpectedModel) -> VllmServer:
    """Look at what the server has. Raises BackendError for a model that is not the expected one."""
    name, room = _served_model(await server.get_json("/v1/models"), server.url, expected)
    info = EngineInfo(
        "remote",
        server.url,
        expected.dtype,
        expected.vocab_size,
        min(room, expected.max_context),
        CAPABILITIES,
        note=f"vLLM {kind.version}",
    )
    engine = VllmServer(server, info, name, expected.end_ids)
    await engine.check_vocabulary()
    await engine.look_for_logits()
    return engine


class VllmServer:
    """See :class:`gpa_engines.servers.kind.ServerEngine`."""

    def __init__(self, server: HttpServer, info: EngineInfo, model: str, end_ids: frozenset[int]) -> None:
        self._server = server
        self._info = info
        self._model = model
        self._end_ids = end_ids
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See :meth:`gpa_engines.engine.Engine.generate`. Raises DeclinedRequest, ServerError."""
        self._check(request.prompt_ids, request.sampling.max_new_tokens)
        request.check_against(self._info.vocab_size, self._info.max_context)
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        clock = RequestClock(len(request.prompt_ids), seed)
        try:
            rest: GenerationRequest | None = request
            if (first := until_minimum(request, self._end_ids, self._info.vocab_size)) is not None:
                ids: list[int] = []
                async with aclosing(self._answer(first, seed)) as answer:
                    async for new, _ in answer:
                        ids.extend(new)
                        clock.count(len(new), ended=False)
                        yield TokenDelta(new)
                rest = after_minimum(request, ids)
                seed = (seed + 1) % 2**63
            if rest is None:
                yield TokenDelta((), "length", clock.usage())
                return
            async with aclosing(self._answer(rest, seed)) as answer:
                async for new, reason in answer:
                    clock.count(len(new), ended=reason is not None)
                    yield TokenDelta(new, reason, None if reason is None else clock.usage())
        except ServerError:
            if not self._closed:
                raise
            yield TokenDelta((), "cancelled", clock.usage())

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """See :meth:`gpa_engines.engine.Engine.logits`."""
        return await self.logits_at(ids, range(len(ids)))

    async def logits_at(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`gpa_engines.engine.GivesRows`: one request per row, each of the prompt up to it."""
        prompt = tuple(int(token) for token in ids)
        if "logits" not in self._info.capabilities:
            raise DeclinedRequest(
                f"{self._server.url} gives no logits; start it with --max-logprobs -1 --logprobs-mode raw_logits"
            )
        if not prompt:
            raise DeclinedRequest("ids is empty; logits needs at least one token id")
        self._check(prompt, 0)
        wanted = np.asarray(positions, np.int64)
        check_positions(wanted, len(prompt))
        rows = np.empty((len(wanted), self._info.vocab_size), np.float32)
        places = iter(enumerate(wanted.tolist()))

        async def fetch() -> None:
            for index, position in places:
                rows[index] = await self._row(prompt[: position + 1])

        tasks = [asyncio.create_task(fetch()) for _ in range(min(ROWS_AT_A_TIME, len(wanted)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return rows

    async def busy(self) -> int:
        """Requests that run or wait on the server, of everybody. Raises ServerError where it is not healthy."""
        await self._server.get_text("/health")
        try:
            return sum(int(float(count)) for count in _COUNTS.findall(await self._server.get_text("/metrics")))
        except ServerRefused:
            return 0  # a server that keeps its figures to itself; our own requests are counted all the same

    async def top_scores(self, ids: Sequence[int], count: int) -> dict[int, float]:
        """See :class:`gpa_engines.servers.kind.ServerEngine`; at most 20 of a server that was not started for more."""
        return scores_by_id(await self._scores(ids, count), self._server.url)

    async def token_names(self, ids: Sequence[int]) -> list[str] | None:
        """See :class:`gpa_engines.servers.kind.ServerEngine`."""
        names = []
        for token in ids:
            try:
                answer = await self._server.post_json("/detokenize", {"model": self._model, "tokens": [token]})
            except ServerRefused:
                return None
            if not isinstance(answer, dict) or not isinstance(answer.get("prompt"), str):
                return None
            names.append(answer["prompt"])
        return names

    async def close(self) -> None:
        """End what runs (reason "cancelled") and drop the connections. Closing twice is harmless."""
        self._closed = True
        await self._server.close()

    async def check_vocabulary(self) -> None:
        """Raise BackendError unless the server's vocabulary is the expected one.

        An id is asked for as a stop id: as part of a prompt, an id outside the vocabulary can end a server.
        """
        size = self._info.vocab_size
        for token, inside in ((size - 1, True), (size, False)):
            body = self._body(GenerationRequest((0,), SamplingParams(max_new_tokens=1), stop_ids=(token,)), 0)
            try:
                await self._server.post_json(COMPLETIONS, body)
                taken = True
            except ServerRefused as error:
                if error.status != 400:
                    raise
                taken = False
            if taken != inside:
                raise BackendError(
                    f"{self._server.url} serves {self._model!r}, whose vocabulary is "
                    f"{'smaller' if inside else 'larger'} than the {size} ids of the model's folder: it is another "
                    "model; start the server with this folder, or give the folder that it serves as --model"
                )

    async def look_for_logits(self) -> None:
        """Declare the capability "logits" where the server gives them, and see what it computes in."""
        try:
            await self._scores((0,), USUAL_MAX_LOGPROBS + 1)  # a small question first: most servers say no
            row = await self._row((0,))
        except ServerRefused:
            return
        if is_log_probabilities(row):
            return
        found, said = coarsest_dtype(row), self._info.dtype
        if said == "float32" != found:
            raise BackendError(
                f"{self._server.url} computes in {found}, not in float32: start it with --dtype float32, or say "
                f"--dtype {found}"
            )
        dtype = found if said == "auto" else said
        self._info = replace(self._info, dtype=dtype, capabilities=CAPABILITIES | {"logits"})

    def _check(self, prompt: Sequence[int], new_tokens: int) -> None:
        if self._closed:
            raise RequestError("the engine is closed; create a new one")
        check_ids("ids", prompt, self._info.vocab_size)
        room = self._info.max_context
        if len(prompt) + new_tokens > room:
            raise CapacityError(
                f"prompt of {len(prompt)} tokens and max_new_tokens {new_tokens} need {len(prompt) + new_tokens} "
                f"positions; {self._server.url} has {room}: shorten the prompt, lower max_new_tokens, or start the "
                "server with a larger --max-model-len"
            )

    def _body(self, request: GenerationRequest, seed: int) -> dict[str, Any]:
        return {"model": self._model, "prompt": list(request.prompt_ids), **vllm_fields(request, seed), **API_FIELDS}

    async def _answer(
        self, request: GenerationRequest, seed: int
    ) -> AsyncGenerator[tuple[tuple[int, ...], FinishReason | None], None]:
        """New ids and, with the last of them, the reason. Raises DeclinedRequest, ServerError."""
        reader = AnswerReader(self._server.url, request, self._info.vocab_size)
        reason: FinishReason | None = None
        body = {**self._body(request, seed), "stream": True}
        try:
            async with aclosing(self._server.post_events(COMPLETIONS, body)) as events:
                async for event in events:
                    choice = self._choice(event)
                    if choice is None:
                        continue
                    if reason is not None:
                        raise MalformedStream(f"{self._server.url} sent more ids after the end of an answer")
                    reason = self._reason(choice.get("finish_reason"))
                    new = reader.take(choice.get("token_ids"), reason)
                    if new or reason is not None:
                        yield new, reason
        except ServerRefused as error:
            raise self._declined(error) from error
        if reason is None:
            raise MalformedStream(f"{self._server.url} ended an answer without saying why")

    def _choice(self, event: Any) -> dict[str, Any] | None:
        """The one choice of an event; None for an event that has none, as usage has."""
        if isinstance(event, dict) and "error" in event:
            said = event["error"].get("message") if isinstance(event["error"], dict) else event["error"]
            raise ServerLost(f"{self._server.url} broke off its answer: {said}")
        choices = event.get("choices") if isinstance(event, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices) or len(choices) > 1:
            raise MalformedStream(f"{self._server.url} sent an event that is no completion: {json.dumps(event)[:200]}")
        if not choices:
            return None
        if choices[0].get("token_ids") is None:
            raise MalformedStream(
                f"{self._server.url} sends no token_ids; return_token_ids needs vLLM 0.10.2: upgrade the server"
            )
        return choices[0]

    def _reason(self, said: Any) -> FinishReason | None:
        if said is None or said in ("stop", "length"):
            return said
        if said == "abort":
            raise ServerLost(f"{self._server.url} broke off its answer: it is shutting down")
        raise ServerLost(f"{self._server.url} broke off its answer: its finish_reason is {said!r}")

    async def _row(self, prompt: tuple[int, ...]) -> NDArray[np.float32]:
        scores = scores_by_id(await self._scores(prompt, -1), self._server.url)
        return full_row(scores, self._info.vocab_size, self._server.url)

    async def _scores(self, prompt: Sequence[int], count: int) -> Any:
        """What the server answers as the best scores after `prompt`."""
        request = GenerationRequest(tuple(prompt), SamplingParams(max_new_tokens=1))
        body = {**self._body(request, 0), "logprobs": count}
        answer = await self._server.post_json(COMPLETIONS, body)
        try:
            return answer["choices"][0]["logprobs"]["top_logprobs"][0]
        except (KeyError, IndexError, TypeError):
            raise MalformedAnswer(f"{self._server.url} gave no logprobs: {json.dumps(answer)[:200]}") from None

    def _declined(self, error: ServerRefused) -> RequestError:
        """A request that is wrong in the server's eyes, told from a server that cannot answer."""
        if error.status in (400, 413, 422):
            return DeclinedRequest(f"{self._server.url} declined the request: {error.detail}")
        return error


def _served_model(answer: Any, url: str, expected: ExpectedModel) -> tuple[str, int]:
    """Name and room of the model to ask for."""
    try:
        models = {entry["id"]: entry for entry in answer["data"]}
        bases = [name for name, entry in models.items() if not entry.get("parent")]
        name = bases[0] if expected.served_name is None else expected.served_name
        if name not in models:
            raise BackendError(f"{url} serves no model {name!r}; it serves {', '.join(map(repr, models))}")
        room = models[name]["max_model_len"] or models[bases[0]]["max_model_len"]
        if type(room) is not int or room < 1:
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise MalformedAnswer(f"{url}/v1/models lists no model as vLLM does: {json.dumps(answer)[:200]}") from None
    return name, room
