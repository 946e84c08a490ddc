"""The one thread of a step engine: it owns the model and batches what is running.

Requests join and leave at any step (iteration-level scheduling: Orca, Yu et al. 2022), and long prompts are fed in
chunks between the steps of the others (chunked prefill: Sarathi, Agrawal et al. 2023).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import GpaError, RequestError
from gpa_engines.engine import FinishReason, GenerationRequest, GenerationUsage, TokenDelta
from gpa_engines.sampling import Sampler
from gpa_engines.step_model import CandidateSet, Interruptible, SlotRequest, StepInterrupted, StepModel, StepRow


@dataclass(slots=True)
class Generation:
    """The state of a request that generates; times from time.perf_counter, 0 while unknown."""

    request: GenerationRequest
    sampler: Sampler
    new_tokens: int = 0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(slots=True)
class Reading:
    """The state of a request for logits.

    positions: int64[P], ascending, of the prompt. logits: float32[P, V], filled row by row. read: rows so far.
    """

    positions: NDArray[np.int64]
    logits: NDArray[np.float32]
    read: int = 0

    def offsets(self, start: int, count: int) -> list[int]:
        """Which of `count` ids from position `start` are wanted."""
        first, last = np.searchsorted(self.positions, (start, start + count))
        return (self.positions[first:last] - start).tolist()

    def add(self, rows: NDArray[np.float32]) -> None:
        self.logits[self.read : self.read + len(rows)] = rows
        self.read += len(rows)


@dataclass(eq=False, slots=True)
class Job:
    """What is queued or running: a generation, or a request for logits.

    pending: ids not yet fed. positions: to reserve. fed: positions in the cache.
    """

    pending: tuple[int, ...]
    positions: int
    goal: Generation | Reading
    candidates: CandidateSet | None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    messages: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    slot: int | None = None
    fed: int = 0
    ended: bool = False

    async def receive(self) -> Any:
        message = await self.messages.get()
        if isinstance(message, Exception):
            raise message
        return message


class Scheduler:
    """The engine's thread. Other threads reach it only through its inbox."""

    def __init__(self, model: StepModel, prefill_chunk: int, name: str) -> None:
        self.model = model
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.outbox: dict[asyncio.AbstractEventLoop, list[tuple[Job, Any]]] = {}
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.refusal: str | None = None
        self.ended = False
        self.on_end: list[Callable[[], object]] = []
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def post(self, action: Callable[[], None]) -> None:
        with self.lock:
            if self.refusal is not None:
                raise RequestError(self.refusal)
            self.inbox.put(action)

    def submit(self, job: Job) -> None:
        self.post(lambda: self.waiting.append(job))

    def cancel(self, job: Job) -> None:
        """Drop the job at the next step boundary; harmless when it has ended."""
        with self.lock:
            if self.refusal is None:
                self.inbox.put(lambda: self._end(job))
                self._interrupt()

    def request_stop(self, on_end: Callable[[], object]) -> bool:
        """Ask the thread to stop; False when it has ended already, else `on_end` runs at its end."""
        with self.lock:
            if self.refusal is None:
                self.refusal = "the engine is closed; create a new one"
                self.inbox.put(None)
                self._interrupt()
            if self.ended:
                return False
            self.on_end.append(on_end)
            return True

    def _interrupt(self) -> None:
        """The inbox holds something that should not wait for the end of a long step."""
        if isinstance(self.model, Interruptible):
            self.model.interrupt()

    def stop(self) -> None:
        self.request_stop(lambda: None)
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _run(self) -> None:
        try:
            while self._read_inbox():
                self._admit()
                if self.running:
                    self._step()
                self._deliver()
        except BaseException as error:
            self._die(error)
        else:
            for job in (*self.running, *self.waiting):
                if isinstance(job.goal, Generation):
                    self._finish(job, job.goal, (), "cancelled")
                else:
                    self._fail(job, RequestError("the engine was closed"))
        self._deliver()
        with self.lock:  # `_interrupt` looks at the model under it
            model = self.model
            del self.model
        del model
        with self.lock:
            for notify in self.on_end:
                notify()
            self.on_end.clear()
            self.ended = True

    def _die(self, error: BaseException) -> None:
        """A defect of the model outside its step, or of this module: no state can be trusted any more."""
        with self.lock:
            self.refusal = f"the engine's thread died of {error!r}; create a new engine"
        while not self.inbox.empty():
            action = self.inbox.get()
            if action is not None:
                with contextlib.suppress(Exception):
                    action()
        for job in (*self.running, *self.waiting):
            message = RequestError(self.refusal)
            message.__cause__ = error
            self._send(job, message)
            job.ended = True

    def _read_inbox(self) -> bool:
        """Do what was asked for since the last step, waiting while there is nothing to run; False is the end."""
        wait = not self.running and not self.waiting
        while True:
            try:
                action = self.inbox.get(block=wait)
            except queue.Empty:
                return True
            if action is None:
                return False
            action()
            wait = not self.running and not self.waiting

    def _admit(self) -> None:
        """Start waiting jobs, first come first served: none overtakes one that waits for room."""
        while self.waiting and len(self.running) < self.model.max_batch:
            job = self.waiting[0]
            reuse = isinstance(job.goal, Generation)
            try:
                slot = self.model.allocate(SlotRequest(job.positions, job.pending, job.candidates, reuse))
            except GpaError as error:
                self._fail(job, error)
                continue
            if slot is None:
                assert self.running, "a request within max_tokens must fit an idle model"
                return
            self.waiting.popleft()
            job.slot, job.started = slot.number, time.perf_counter()
            job.fed, job.pending = slot.filled, job.pending[slot.filled :]
            self.running.append(job)

    def _step(self) -> None:
        planned = self._plan()
        try:
            results = self.model.step([row for _, row in planned])
        except StepInterrupted:
            return
        except Exception as error:
            for job, _ in planned:
                self._fail(job, error)
            return
        for (job, row), logits in zip(planned, results, strict=True):
            job.fed += len(row.ids)
            job.pending = job.pending[len(row.ids) :]
            if logits is not None:
                self._advance(job, row, logits)

    def _plan(self) -> list[tuple[Job, StepRow]]:
        """Every decoding job, and prompts in order of arrival up to one chunk of tokens in all.

        A prompt is cut at multiples of the chunk wherever it stands in the queue, and whatever of it a cache holds
        already: its arithmetic, to the last bit, must not depend on the others.
        """
        planned = []
        budget = self.prefill_chunk
        for job in self.running:
            assert job.slot is not None
            ids = job.pending[: self.prefill_chunk - job.fed % self.prefill_chunk]
            if len(job.pending) > 1 or job.fed == 0:
                if len(ids) > budget:
                    budget = 0
                    continue
                budget -= len(ids)
            planned.append((job, _row(job, job.slot, ids)))
        return planned

    def _advance(self, job: Job, row: StepRow, logits: NDArray[np.float32]) -> None:
        goal = job.goal
        if isinstance(goal, Reading):
            goal.add(logits)
            if goal.read == len(goal.positions):
                self._send(job, goal.logits)
                self._end(job)
            return
        try:
            token = goal.sampler.next(logits)
        except Exception as error:
            self._fail(job, error)
            return
        goal.last_token = time.perf_counter()
        goal.first_token = goal.first_token or goal.last_token
        if token in goal.request.stop_ids:
            self._finish(job, goal, (), "stop")
            return
        goal.new_tokens += 1
        job.pending = (token,)
        if goal.new_tokens == goal.request.sampling.max_new_tokens:
            self._finish(job, goal, (token,), "length")
        else:
            self._send(job, TokenDelta((token,)))

    def _finish(self, job: Job, goal: Generation, ids: tuple[int, ...], reason: FinishReason) -> None:
        now = time.perf_counter()
        started = job.started or now
        usage = GenerationUsage(
            prompt_tokens=len(goal.request.prompt_ids),
            new_tokens=goal.new_tokens,
            seed=goal.sampler.seed,
            queue=started - job.submitted,
            prefill=(goal.first_token or now) - started,
            decode=goal.last_token - goal.first_token,
        )
        self._send(job, TokenDelta(ids, reason, usage))
        self._end(job)

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, GpaError):
            cause, error = error, RequestError(f"the model failed in this request's step: {error!r}")
            error.__cause__ = cause
        self._send(job, error)
        self._end(job)

    def _end(self, job: Job) -> None:
        """Free what the job holds."""
        if job.ended:
            return
        job.ended = True
        if job.slot is None:
            self.waiting.remove(job)
        else:
            self.running.remove(job)
            self.model.release(job.slot)

    def _send(self, job: Job, message: Any) -> None:
        self.outbox.setdefault(job.loop, []).append((job, message))

    def _deliver(self) -> None:
        """Hand over a step's messages, one wake-up per event loop; a job whose loop is gone is cancelled."""
        outbox, self.outbox = self.outbox, {}
        for loop, messages in outbox.items():
            if not post_to(loop, _put_all, messages):
                for job, _ in messages:
                    self._end(job)


def _row(job: Job, slot: int, ids: tuple[int, ...]) -> StepRow:
    if isinstance(job.goal, Reading):
        offsets = job.goal.offsets(job.fed, len(ids))
        return StepRow(slot, ids, job.fed, "at" if offsets else "none", job.candidates, offsets)
    return StepRow(slot, ids, job.fed, "last" if len(ids) == len(job.pending) else "none", job.candidates)


def post_to(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> bool:
    """Run `function` on the loop's thread; False when the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


def _put_all(messages: Sequence[tuple[Job, Any]]) -> None:
    for job, message in messages:
        job.messages.put_nowait(message)
