"""The Engine that stands on a step model and its scheduler thread."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import CapacityError, RequestError
from gpa_engines.engine import Capability, EngineInfo, GenerationRequest, TokenDelta, check_ids, check_positions
from gpa_engines.memory import MemoryMeter
from gpa_engines.sampling import Sampler
from gpa_engines.scheduler import Generation, Job, Reading, Scheduler, post_to
from gpa_engines.step_model import CandidateSet, StepModel

T = TypeVar("T")

CAPABILITIES: frozenset[Capability] = frozenset(("logits", "batch", "allowed", "seed", "chunked_prefill"))
"""What :class:`StepEngine` makes of every step model."""

INVARIANT: frozenset[Capability] = frozenset((*CAPABILITIES, "batch_invariant"))
"""Those of a step model that promises the last bit."""


class StepEngine:
    """An Engine over a step model. Any number of threads and event loops may use one.

    prefill_chunk: prompt tokens per step; smaller stalls running requests less, larger reads a prompt faster.
    on_start: runs first on the engine's thread, for settings and weights that belong to a thread; the engine is made
    once it has returned, and not at all if it raises. memory_meter: of the device, None where the process's memory is
    all there is.
    """

    def __init__(
        self,
        info: EngineInfo,
        model: StepModel,
        *,
        prefill_chunk: int,
        on_start: Callable[[], None] | None = None,
        memory_meter: MemoryMeter | None = None,
    ) -> None:
        self._info = info
        self._memory_meter = memory_meter
        self._max_tokens = model.max_tokens
        self._scheduler = Scheduler(model, prefill_chunk, f"gpa-engine-{info.backend}")
        # Also runs when the interpreter exits: a daemon thread must not be inside a kernel while that happens.
        self._finalizer = weakref.finalize(self, Scheduler.stop, self._scheduler)
        if on_start is not None:
            try:
                _run_on(self._scheduler, on_start)
            except BaseException:
                self._finalizer()
                raise

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def memory_meter(self) -> MemoryMeter | None:
        """See :class:`gpa_engines.memory.MemoryReport`."""
        return self._memory_meter

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See :meth:`gpa_engines.engine.Engine.generate`. Requests are served in the order of submission."""
        request.check_against(self._info.vocab_size, self._info.max_context)
        prompt, sampling = request.prompt_ids, request.sampling
        self._check_room(len(prompt) + sampling.max_new_tokens, "shorten the prompt, lower max_new_tokens")
        sampler = Sampler(sampling, prompt, request.stop_ids, request.allowed)
        self._check_candidates(sampler.candidate_ids)
        candidates = None if sampler.candidate_ids is None else CandidateSet(sampler.candidate_ids)
        job = Job(prompt, len(prompt) + sampling.max_new_tokens, Generation(request, sampler), candidates)
        finished = False
        self._scheduler.submit(job)
        try:
            while not finished:
                delta = await job.receive()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            if not finished:
                self._scheduler.cancel(job)

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32[T, V], unnormalised, through the same steps as generation; waits its turn like a request."""
        return await self.logits_at(ids, range(len(ids)))

    async def logits_at(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`gpa_engines.engine.GivesRows`."""
        prompt = tuple(int(token) for token in ids)
        if not prompt:
            raise RequestError("ids is empty; logits needs at least one token id")
        check_ids("ids", prompt, self._info.vocab_size)
        if len(prompt) > self._info.max_context:
            raise CapacityError(f"{len(prompt)} ids; the model has {self._info.max_context} positions: give fewer")
        self._check_room(len(prompt), "give fewer ids")
        wanted = np.asarray(positions, np.int64)
        check_positions(wanted, len(prompt))
        try:
            result = np.empty((len(wanted), self._info.vocab_size), dtype=np.float32)
        except MemoryError as error:
            gibibytes = len(wanted) * self._info.vocab_size * 4 / 2**30
            raise CapacityError(f"logits of {len(wanted)} positions need {gibibytes:.1f} GiB: ask for fewer") from error
        if not len(wanted):
            return result
        last = int(wanted[-1]) + 1
        job = Job(prompt[:last], last, Reading(wanted, result), None)
        self._scheduler.submit(job)
        try:
            return await job.receive()
        finally:
            self._scheduler.cancel(job)

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread between two steps, after everything submitted or cancelled before."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                outcome, error = function(), None
            except Exception as raised:
                outcome, error = None, raised
            post_to(loop, _resolve, future, outcome, error)

        self._scheduler.post(run)
        return await future

    async def close(self) -> None:
        """End what runs (reason "cancelled"), stop the thread and free the model. Closing twice is harmless."""
        self._finalizer.detach()
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        if self._scheduler.request_stop(lambda: post_to(loop, ended.set)):
            await ended.wait()
        self._scheduler.thread.join()

    def _check_candidates(self, ids: NDArray[np.int64] | None) -> None:
        """Refuse an answer that may hold ids of which an engine with a part of the vocabulary has no logits."""
        if self._info.logit_ids is None:
            return
        if ids is None:
            wrong = "may hold any id"
        else:
            missing = np.ones(len(ids), np.bool_)
            for part in self._info.logit_ids:
                missing &= (ids < part.start) | (ids >= part.stop)
            if not missing.any():
                return
            wrong = f"may hold id {ids[missing][0]}"
        count = sum(map(len, self._info.logit_ids))
        note = f" ({self._info.note})" if self._info.note else ""
        raise RequestError(
            f"the answer {wrong}, but this engine has logits of only {count} of {self._info.vocab_size} ids{note}: "
            "give the ids that are possible as `allowed`"
        )

    def _check_room(self, needed: int, advice: str) -> None:
        if needed > self._max_tokens:
            raise CapacityError(
                f"the request needs {needed} positions; max_tokens_in_flight is {self._max_tokens}: "
                f"{advice} or raise max_tokens_in_flight"
            )


def _run_on(scheduler: Scheduler, function: Callable[[], None]) -> None:
    """Run `function` on the scheduler's thread, wait for it, and raise what it raised."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    scheduler.post(run)
    outcome.result()


def _resolve(future: asyncio.Future[Any], outcome: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(outcome)
    else:
        future.set_exception(error)
