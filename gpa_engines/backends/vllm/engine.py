"""The vLLM engine: vLLM's AsyncLLM in this process, its model in processes of its own."""

# vllm has an environment of its own, which is not that of the type checker.
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import CapacityError, GpaError, RequestError
from gpa_engines.backends.vllm.llm import RunningLlm, start_llm
from gpa_engines.backends.vllm.logits import check_memory, reads_whole
from gpa_engines.backends.vllm.loop_thread import Stream, StreamEnded
from gpa_engines.backends.vllm.sampling_fields import choose_seed, logits_fields, sampling_fields
from gpa_engines.backends.vllm.settings import Settings
from gpa_engines.engine import (
    EngineInfo,
    FinishReason,
    GenerationRequest,
    GenerationUsage,
    SamplingParams,
    TokenDelta,
    check_ids,
    check_positions,
)

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

T = TypeVar("T")

REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled"}

CLOSED = "the engine is closed; create a new one"

AT_ONCE = 16
"""Requests for logits of one position each that run at a time; a sort of all their rows is in memory at once."""


def build_engine(folder: Path, settings: Settings) -> VllmEngine:
    """What :func:`gpa_engines.backends.vllm.create_engine` does, once vllm may be imported."""
    engine = VllmEngine(start_llm(folder, settings))
    try:
        engine.check()
    except BaseException:
        engine.shut_down()
        raise
    return engine


class VllmEngine:
    """An Engine over a running AsyncLLM. Any number of threads and event loops may use one."""

    def __init__(self, llm: RunningLlm) -> None:
        self._llm = llm
        # Also runs when the engine is forgotten or the interpreter exits.
        self._finalizer = weakref.finalize(self, RunningLlm.stop, llm)

    @property
    def info(self) -> EngineInfo:
        return self._llm.info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See :meth:`gpa_engines.engine.Engine.generate`."""
        self._check_open()
        request.check_against(self.info.vocab_size, self.info.max_context)
        answer = _Answer(request, choose_seed(request.sampling))
        fields = sampling_fields(request, answer.seed)
        stream = self._open(lambda: self._llm.generate(request.prompt_ids, fields))
        finished = False
        try:
            while not finished:
                try:
                    delta = answer.add(await stream.receive())
                except StreamEnded:
                    delta = answer.cancelled()
                finished = delta.finish_reason is not None
                if finished or delta.ids:
                    yield delta
        except GpaError:
            finished = True
            raise
        except Exception as error:
            finished = True
            raise self._llm.explain(error) from error
        finally:
            if not finished:
                stream.cancel()

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32[T, V], unnormalised, of one prefill."""
        return await self.logits_at(ids, range(len(ids)))

    async def logits_at(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`gpa_engines.engine.GivesRows`. Of few positions each is the last of a prefill of its own."""
        self._check_open()
        prompt = tuple(int(token) for token in ids)
        if not prompt:
            raise RequestError("ids is empty; logits needs at least one token id")
        check_ids("ids", prompt, self.info.vocab_size)
        if len(prompt) > self.info.max_context:
            raise CapacityError(f"{len(prompt)} ids; the model has {self.info.max_context} positions: give fewer")
        wanted = [int(position) for position in positions]
        check_positions(np.asarray(wanted, np.int64), len(prompt))
        if not wanted:
            return np.empty((0, self.info.vocab_size), np.float32)
        needed = wanted[-1] + 1
        if needed >= self._llm.max_model_len:
            raise CapacityError(
                f"vLLM gives logits of at most {self._llm.max_model_len - 1} positions, since it always generates a "
                f"token too; the last one wanted is {wanted[-1]}: give fewer ids, or raise max_context"
            )
        if reads_whole(wanted):
            check_memory(wanted, self.info.vocab_size)
            return (await self._read(prompt[:needed], needed))[wanted]
        turns = asyncio.Semaphore(AT_ONCE)

        async def read(position: int) -> NDArray[np.float32]:
            async with turns:
                return await self._read(prompt[: position + 1], 1)

        rows = await asyncio.gather(*(read(position) for position in wanted))
        return np.concatenate(rows)

    async def close(self) -> None:
        """End what runs (reason "cancelled"), end vLLM's processes and free their memory. Closing twice is harmless."""
        self._finalizer.detach()
        await asyncio.to_thread(self._llm.stop)

    def shut_down(self) -> None:
        """As `close`, for a thread without an event loop."""
        self._finalizer.detach()
        self._llm.stop()

    def check(self) -> None:
        """Serve one request, as a thread without an event loop; raises what is wrong with the engine as a GpaError."""
        sampling = SamplingParams(temperature=1.0, top_k=2, max_new_tokens=1, seed=0)
        request = GenerationRequest((0,), sampling, allowed=(range(2),))

        async def serve() -> None:
            async for _ in self.generate(request):
                pass

        self._llm.thread.call(serve)

    async def _read(self, ids: tuple[int, ...], count: int) -> NDArray[np.float32]:
        """float32[count, V]: of all `count` ids, or with a count of 1 of the last."""
        stream = self._open(lambda: self._llm.read(ids, logits_fields(prompt=count > 1)))
        try:
            taken = await stream.receive()
        except StreamEnded:
            raise RequestError("the engine was closed while it computed logits") from None
        except GpaError:
            raise
        except Exception as error:
            raise self._llm.explain(error) from error
        finally:
            stream.cancel()
        return await asyncio.to_thread(taken.rows, count, self.info.vocab_size)

    def _check_open(self) -> None:
        if self._llm.stopped:
            raise RequestError(CLOSED)

    def _open(self, make: Callable[[], AsyncGenerator[T, None]]) -> Stream[T]:
        try:
            return self._llm.thread.stream(make)
        except StreamEnded:
            raise RequestError(CLOSED) from None


class _Answer:
    """What a caller has been given of one answer, and when."""

    def __init__(self, request: GenerationRequest, seed: int) -> None:
        self.seed = seed
        self._request = request
        self._submitted = time.perf_counter()
        self._first = 0.0
        self._last = 0.0
        self._new_tokens = 0

    def add(self, output: RequestOutput) -> TokenDelta:
        """vLLM's new ids without the stop id, and with its last output the reason and the usage."""
        completion = output.outputs[0]
        ids, reason = tuple(completion.token_ids), completion.finish_reason
        now = time.perf_counter()
        if ids:
            self._first, self._last = self._first or now, now
        if reason is None:
            self._new_tokens += len(ids)
            return TokenDelta(ids)
        if reason not in REASONS:
            raise RequestError(f"vLLM ended the answer with the reason {reason!r}")
        if REASONS[reason] == "stop" and ids and ids[-1] in self._request.stop_ids:
            ids = ids[:-1]
        self._new_tokens += len(ids)
        return TokenDelta(ids, REASONS[reason], self._usage(output.metrics))

    def cancelled(self) -> TokenDelta:
        """The last delta of an answer whose engine was closed."""
        return TokenDelta((), "cancelled", self._usage(None))

    def _usage(self, metrics: Any) -> GenerationUsage:
        """vLLM's own clock tells the prefill from the wait before it; the caller's tells how long both took."""
        first = self._first or time.perf_counter()
        prefill, decode = 0.0, max(0.0, self._last - first)
        if metrics is not None and metrics.scheduled_ts and metrics.first_token_ts:
            prefill = max(0.0, metrics.first_token_ts - metrics.scheduled_ts)
            decode = max(0.0, metrics.last_token_ts - metrics.first_token_ts)
        return GenerationUsage(
            prompt_tokens=len(self._request.prompt_ids),
            new_tokens=self._new_tokens,
            seed=self.seed,
            queue=max(0.0, first - self._submitted - prefill),
            prefill=prefill,
            decode=decode,
        )
