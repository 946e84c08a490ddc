"""One engine over SGLang, whichever way it is reached: in a process of our own or over HTTP.

A request may take several legs: SGLang ends an answer at the model's own end ids, stop ids or not, and its own sampler
cannot hold stop ids back. The next leg is sent the prompt and the answer so far, which SGLang finds in its cache.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, CapacityError, RequestError
from gpa_engines.engine import (
    Capability,
    EngineInfo,
    FinishReason,
    GenerationRequest,
    TokenDelta,
    check_ids,
    check_positions,
)
from gpa_engines.passing_thread import in_passing_thread
from gpa_engines.sampling import candidate_ids
from gpa_engines.servers.clock import RequestClock
from gpa_engines.servers.lm_head import LMHead
from gpa_engines.servers.sglang_fields import native_fields, reading_fields, rule_fields, rule_processor
from gpa_engines.servers.sglang_stream import Finish, OutputReader, UnexpectedOutput, hidden_rows

SamplingMode = Literal["rule", "native"]
"""Who chooses the tokens: the project's own rule inside SGLang's scheduler, or SGLang's own sampler."""

SAMPLING_MODES: tuple[SamplingMode, ...] = ("rule", "native")


class SglangTransport(Protocol):
    """A way to SGLang. body: the fields of `/generate`, which are those of `sglang.Engine.async_generate`."""

    def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """Chunks as SGLang sends them, in either style. Closing the generator early aborts the request."""
        ...

    async def ask(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The one answer to a request that does not stream. Cancelling aborts the request."""
        ...

    async def close(self) -> None:
        """End what runs, and SGLang itself where it is ours. Closing twice is harmless."""
        ...


@dataclass(frozen=True, slots=True)
class SglangFacts:
    """What SGLang says of itself.

    max_prompt: ids that a prompt may have; an answer may bring them to as many. Beyond, SGLang shortens the answer
    without a word. hidden_states: whether it gives those of a whole prompt. processors: whether it takes custom logit
    processors. deterministic: whether seeds count for its own sampler. overlap: whether it prepares a step before the
    last one's tokens are known.
    """

    version: str
    device: str
    dtype: str
    max_prompt: int
    hidden_states: bool
    processors: bool
    deterministic: bool
    overlap: bool

    @classmethod
    def from_server_info(cls, info: Mapping[str, Any]) -> SglangFacts:
        """From `/server_info`, or `Engine.get_server_info`. Raises BackendError for something else."""
        longest = info.get("max_req_input_len")
        if not isinstance(longest, int) or "version" not in info:
            raise BackendError(
                f"the server says {str(info)[:200]}, which is not what an SGLang server says of itself; is it one?"
            )
        mode = info.get("return_hidden_states_mode")
        return cls(
            version=str(info["version"]),
            device=str(info.get("device") or "unknown"),
            dtype=str(info.get("dtype") or "auto").removeprefix("torch."),
            max_prompt=longest - 1,
            hidden_states=info.get("enable_return_hidden_states") is True or mode in (True, "full"),
            processors=info.get("enable_custom_logit_processor") is True,
            deterministic=info.get("enable_deterministic_inference") is True,
            overlap=info.get("disable_overlap_schedule") is not True,
        )


class SglangEngine:
    """The Engine protocol over SGLang. sampling: see `SAMPLING_MODES`. head: None leaves out the logits."""

    def __init__(
        self,
        transport: SglangTransport,
        facts: SglangFacts,
        *,
        vocab_size: int,
        sampling: SamplingMode,
        head: LMHead | None,
        max_context: int | None = None,
        dtype: str | None = None,
        note: str = "",
    ) -> None:
        """max_context: the model's own, where SGLang has room for more. dtype: as this project names it.

        Raises BackendError for the rule on a server that does not take processors.
        """
        if sampling == "rule" and not facts.processors:
            raise BackendError(
                "sampling is 'rule', and this SGLang server takes no logit processors: start it with "
                "--enable-custom-logit-processor where gpa-engines is installed, or use sampling=native"
            )
        self._transport = transport
        self._facts = facts
        self._sampling = sampling
        self._head = head if facts.hidden_states else None
        self._closed = False
        self._info = EngineInfo(
            backend="sglang",
            device=facts.device,
            dtype=dtype or facts.dtype,
            vocab_size=vocab_size,
            max_context=facts.max_prompt if max_context is None else min(max_context, facts.max_prompt),
            capabilities=frozenset(self._capabilities()),
            note=note or f"SGLang {facts.version}",
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See :meth:`gpa_engines.engine.Engine.generate`. Raises RequestError for what SGLang cannot do as asked.

        SGLang does not tell waiting and reading the prompt apart: usage has both as `prefill`.
        """
        self._check_open()
        request.check_against(self._info.vocab_size, self._info.max_context)
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        answer = _Answer(request, self._info.vocab_size)
        clock = RequestClock(len(request.prompt_ids), seed)
        ids: tuple[int, ...] = ()
        reason: FinishReason | None = None
        try:
            while reason is None:
                before = len(answer.ids)
                async with aclosing(self._leg(self._body(request, answer.ids, seed))) as leg:
                    async for new, finish in leg:
                        ids, reason = answer.take(new, finish)
                        clock.count(len(ids), ended=reason is not None)
                        if ids and reason is None:
                            yield TokenDelta(ids)
                if reason is None and len(answer.ids) == before:
                    raise UnexpectedOutput("SGLang ended an answer without a new token, before what it was asked for")
        except RequestError:
            if not self._closed:
                raise
            ids, reason = (), "cancelled"
        yield TokenDelta(ids, reason, clock.usage())

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32[T, V], unnormalised: the head's product, in float32, with the hidden states that SGLang gives."""
        return await self.logits_at(ids, range(len(ids)))

    async def logits_at(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`gpa_engines.engine.GivesRows`."""
        self._check_open()
        prompt = [int(token) for token in ids]
        if not prompt:
            raise RequestError("ids is empty; logits needs at least one token id")
        check_ids("ids", prompt, self._info.vocab_size)
        if len(prompt) > self._info.max_context:
            raise CapacityError(f"{len(prompt)} ids; the model has {self._info.max_context} positions: give fewer")
        wanted = np.asarray(positions, np.int64)
        check_positions(wanted, len(prompt))
        head = self._head
        if head is None:
            raise RequestError(f"this SGLang engine gives no logits: {self._without_logits()}")
        if not len(wanted):
            return np.empty((0, self._info.vocab_size), np.float32)
        hidden = await self._hidden(prompt, wanted)
        return await asyncio.to_thread(in_passing_thread, lambda: head.logits(hidden))

    async def _hidden(self, prompt: Sequence[int], wanted: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[P, H]: hidden states at these positions, from the last on.

        Of a prompt that it reads in parts SGLang gives those of the last part alone; then the prompt is asked for again
        without that part.
        """
        parts: list[NDArray[np.float32]] = []
        start = end = int(wanted[-1]) + 1
        while start > wanted[0]:
            body = {
                "rid": uuid.uuid4().hex,
                "input_ids": prompt[:start],
                "sampling_params": reading_fields(),
                "stream": False,
                "return_hidden_states": True,
                # Positions that are found in the cache have none; under a salt of its own nothing is found.
                "cache_salt": uuid.uuid4().hex,
            }
            parts.insert(0, hidden_rows(await self._transport.ask(body), start))
            start -= len(parts[0])
        rows = np.concatenate(parts)
        assert len(rows) == end - start
        return rows[wanted - start]

    async def close(self) -> None:
        """See :meth:`gpa_engines.engine.Engine.close`."""
        self._closed = True
        await self._transport.close()

    def _capabilities(self) -> set[Capability]:
        found: set[Capability] = {"batch", "allowed", "chunked_prefill"}
        if self._sampling == "rule" or self._facts.deterministic:
            found.add("seed")
        if self._head is not None:
            found.add("logits")
        return found

    def _body(self, request: GenerationRequest, answer: Sequence[int], seed: int) -> dict[str, Any]:
        """One leg's request. The id has one length for all: SGLang aborts every request whose id begins alike."""
        body = {"rid": uuid.uuid4().hex, "input_ids": [*request.prompt_ids, *answer], "stream": True}
        if self._sampling == "rule":
            fields = rule_fields(request, answer, seed)
            return body | {"sampling_params": fields, "custom_logit_processor": rule_processor()}
        fields = native_fields(
            request,
            answer,
            seed,
            self._info.vocab_size,
            deterministic=self._facts.deterministic,
            overlap=self._facts.overlap,
        )
        return body | {"sampling_params": fields}

    async def _leg(self, body: Mapping[str, Any]) -> AsyncGenerator[tuple[tuple[int, ...], Finish | None], None]:
        reader = OutputReader()
        async with aclosing(self._transport.stream(body)) as chunks:
            async for chunk in chunks:
                new, finish = reader.read(chunk)
                yield new, finish
                if finish is not None:
                    return
        raise UnexpectedOutput("SGLang ended its stream without a reason")

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the engine is closed; create a new one")

    def _without_logits(self) -> str:
        if not self._facts.hidden_states:
            return "the server was not started with --enable-return-hidden-states"
        return "the model's folder holds no weights to multiply its hidden states with"


class _Answer:
    """One answer as it comes; what SGLang may not give is not passed on as if it were right."""

    def __init__(self, request: GenerationRequest, vocab_size: int) -> None:
        candidates = candidate_ids(request.allowed, request.stop_ids)
        self._possible = range(vocab_size) if candidates is None else frozenset(candidates.tolist())
        self._most = request.sampling.max_new_tokens
        self._stops = frozenset(request.stop_ids)
        self.ids: list[int] = []

    def take(self, new: tuple[int, ...], finish: Finish | None) -> tuple[tuple[int, ...], FinishReason | None]:
        """The new ids that belong to the answer, and its end; None where more follows. Raises UnexpectedOutput."""
        stopped = finish is not None and finish.matched in self._stops
        kept = new[:-1] if stopped else new
        for token in kept:
            if token not in self._possible or token in self._stops:
                raise UnexpectedOutput(f"SGLang gave id {token}, which may not be part of the answer")
        self.ids.extend(kept)
        if len(self.ids) > self._most:
            raise UnexpectedOutput(f"SGLang gave {len(self.ids)} tokens; it was asked for {self._most}")
        if stopped:
            return kept, "stop"
        return kept, "length" if finish is not None and len(self.ids) == self._most else None
