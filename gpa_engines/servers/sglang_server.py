"""An engine over one SGLang server: its `/generate` with token ids in and out.

Nothing of SGLang is installed here. The shapes were recorded from SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError
from gpa_engines.engine import EngineInfo, GenerationRequest, TokenDelta
from gpa_engines.lm_config import LMConfig
from gpa_engines.passing_thread import in_passing_thread
from gpa_engines.servers.http_server import (
    HttpServer,
    MalformedAnswer,
    MalformedStream,
    ServerAccess,
    ServerError,
    ServerRefused,
)
from gpa_engines.servers.key import read_key
from gpa_engines.servers.kind import ExpectedModel, ServerKind
from gpa_engines.servers.lm_head import LMHead
from gpa_engines.servers.sglang_engine import SamplingMode, SglangEngine, SglangFacts
from gpa_engines.servers.sglang_fields import NEVER, reading_fields
from gpa_engines.servers.sglang_stream import RequestAborted, UnexpectedOutput, aborted

GENERATE = "/generate"
INFO_PATHS = ("/server_info", "/get_server_info")
"""The second is the name of older versions."""

ABORT_SECONDS = 2.0
"""That telling a server of an abort may take; dropping the connection tells it too, later."""


async def open_engine(
    server: HttpServer,
    kind: ServerKind,
    expected: ExpectedModel,
    *,
    backend: str = "remote",
    sampling: SamplingMode = "native",
) -> SglangServer:
    """Look at what the server has. Raises BackendError for a vocabulary that is not the expected one, CheckpointError
    for weights here that are damaged.

    sampling: "rule" only for a server in whose environment gpa_engines is installed: where it is missing, the first
    request ends the server.
    """
    facts = SglangFacts.from_server_info(await _server_info(server))
    await _check_vocabulary(server, expected.vocab_size)
    engine = SglangEngine(
        SglangHttp(server),
        facts,
        vocab_size=expected.vocab_size,
        sampling=sampling,
        head=LMHead.find(expected.folder, LMConfig.from_file(expected.folder / "config.json")),
        max_context=expected.max_context,
        dtype=None if expected.dtype == "auto" else expected.dtype,
        note=f"SGLang {kind.version or facts.version}",
    )
    info = replace(engine.info, backend=backend, device=server.url)
    return SglangServer(server, engine, info)


def connect_server(
    folder: Path,
    sampling: SamplingMode,
    url: str,
    key_file: str | None,
    verify: bool | str,
    dtype: str,
    max_context: int | None,
) -> SglangServer:
    """The engine over a running server that has the model of `folder`. Raises BackendError, CheckpointError."""
    config = LMConfig.from_file(folder / "config.json")
    server = HttpServer(ServerAccess(url, read_key(key_file), verify))
    expected = ExpectedModel(
        vocab_size=config.vocab_size,
        max_context=min(config.max_position_embeddings, max_context or config.max_position_embeddings),
        end_ids=frozenset(),
        dtype=dtype,
        folder=folder,
    )

    async def opened() -> SglangServer:
        try:
            return await open_engine(server, ServerKind("sglang", ""), expected, backend="sglang", sampling=sampling)
        finally:
            await server.close()  # connections of this loop; the engine's own opens others

    try:
        # A loop may be running already where this is called.
        return in_passing_thread(lambda: asyncio.run(opened()))
    except ServerError as error:
        raise BackendError(str(error)) from error


class SglangHttp:
    """A :class:`~gpa_engines.servers.sglang_engine.SglangTransport`."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """See the protocol. Raises DeclinedRequest for what the server refuses, ServerError where it fails."""
        ended = False
        try:
            async with aclosing(self._server.post_events(GENERATE, body)) as events:
                async for event in events:
                    if not isinstance(event, dict):
                        raise MalformedStream(
                            f"{self._server.url}{GENERATE} sent {str(event)[:80]}; expected an object"
                        )
                    ended = "error" in event or _is_last(event)
                    yield event
            ended = True
        except ServerRefused as error:
            ended = True
            raise _told(error) from error
        finally:
            if not ended:
                await self._abort(body["rid"])

    async def ask(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """See the protocol. Raises as `stream`."""
        ended = False
        try:
            answer = await self._server.post_json(GENERATE, body)
            ended = True
        except ServerRefused as error:
            ended = True
            raise _told(error) from error
        finally:
            if not ended:
                await self._abort(body["rid"])
        if not isinstance(answer, dict):
            raise MalformedAnswer(f"{self._server.url}{GENERATE} answered {str(answer)[:80]}; expected an object")
        return answer

    async def close(self) -> None:
        await self._server.close()

    async def _abort(self, rid: str) -> None:
        with suppress(ServerError, TimeoutError):
            async with asyncio.timeout(ABORT_SECONDS):
                await self._server.post_text("/abort_request", {"rid": rid})


class SglangServer:
    """See :class:`gpa_engines.servers.kind.ServerEngine`."""

    def __init__(self, server: HttpServer, engine: SglangEngine, info: EngineInfo) -> None:
        self._server = server
        self._engine = engine
        self._info = info

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See :meth:`gpa_engines.engine.Engine.generate`. Raises DeclinedRequest, ServerError."""
        with self._failures():
            async with aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    yield delta

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """See :meth:`gpa_engines.engine.Engine.logits`."""
        with self._failures():
            return await self._engine.logits(ids)

    async def logits_at(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`gpa_engines.engine.GivesRows`."""
        with self._failures():
            return await self._engine.logits_at(ids, positions)

    async def busy(self) -> int:
        """See :class:`gpa_engines.servers.kind.ServerEngine`. The count may be some steps old."""
        # This one its scheduler answers, so that a hanging one shows; the counts are read from memory that it writes.
        await _server_info(self._server)
        try:
            answer = await self._server.get_json("/v1/loads?include=core")
            loads = answer["loads"]
            return sum(int(load["num_running_reqs"]) + int(load["num_waiting_reqs"]) for load in loads)
        except ServerRefused as error:
            if error.status != 404:
                raise
            return 0  # an older version; our own requests are counted all the same
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedAnswer(f"{self._server.url}/v1/loads: no running and waiting requests in it") from error

    async def top_scores(self, ids: Sequence[int], count: int) -> dict[int, float]:
        """See :class:`gpa_engines.servers.kind.ServerEngine`: log-probabilities."""
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": list(ids),
            "sampling_params": reading_fields(),
            "stream": False,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": count,
        }
        with self._failures():
            answer = await SglangHttp(self._server).ask(body)
            if "error" in answer:
                raise aborted(answer["error"])
            try:
                (first,) = answer["meta_info"]["output_top_logprobs"]
                return {int(token): float(score) for score, token, *_ in first}
            except (KeyError, TypeError, ValueError) as error:
                raise UnexpectedOutput("SGLang sent no output_top_logprobs of one token") from error

    async def token_names(self, ids: Sequence[int]) -> list[str] | None:
        """See :class:`gpa_engines.servers.kind.ServerEngine`."""
        body = {"tokens": [[token] for token in ids], "skip_special_tokens": False}
        try:
            answer = await self._server.post_json("/detokenize", body)
        except ServerRefused:
            return None  # started with --skip-tokenizer-init, or older
        names = answer.get("text") if isinstance(answer, dict) else None
        if not isinstance(names, list) or len(names) != len(ids) or not all(isinstance(name, str) for name in names):
            return None
        return names

    async def close(self) -> None:
        """End what runs (reason "cancelled") and drop the connections. Closing twice is harmless."""
        await self._engine.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Failures of the server as ServerError; what it declines is no failure."""
        try:
            yield
        except UnexpectedOutput as error:
            raise MalformedStream(f"{self._server.url}: {error}") from error
        except RequestAborted as error:
            raise ServerRefused(f"{self._server.url}: {error}", error.status or 500, str(error)) from error


async def _server_info(server: HttpServer) -> Mapping[str, Any]:
    for path in INFO_PATHS:
        try:
            info = await server.get_json(path)
        except ServerRefused as error:
            if error.status != 404:
                raise
            continue
        if isinstance(info, dict):
            return info
    raise BackendError(f"{server.url} has neither {' nor '.join(INFO_PATHS)}; is it an SGLang server?")


async def _check_vocabulary(server: HttpServer, size: int) -> None:
    """Raise BackendError unless the server's vocabulary is the expected one.

    An id is given as one with a bias: as part of a prompt, an id outside the vocabulary ends the server.
    """
    for token, inside in ((size - 1, True), (size, False)):
        fields = reading_fields() | {"logit_bias": {str(token): NEVER}}
        body = {"rid": uuid.uuid4().hex, "input_ids": [0], "sampling_params": fields, "stream": False}
        try:
            await server.post_json(GENERATE, body)
            known = True
        except ServerRefused as error:
            if error.status != 400 or "logit_bias" not in error.detail:
                raise
            known = False
        if known != inside:
            raise BackendError(
                f"{server.url} has a model of {'more' if known else 'fewer'} than {size} ids; config.json here says "
                f"{size}: start the server with the folder that is given here"
            )


def _told(error: ServerRefused) -> Exception:
    """A refusal of the request itself, or the failure that it is."""
    return aborted({"message": error.detail or str(error), "code": 400}) if error.status == 400 else error


def _is_last(event: Mapping[str, Any]) -> bool:
    meta = event.get("meta_info")
    return isinstance(meta, dict) and meta.get("finish_reason") is not None
