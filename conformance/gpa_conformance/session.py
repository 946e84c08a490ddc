"""One engine under test for many cases: opened when a case needs it, and opened anew when a case has broken it."""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.codec import SpeechCodec
from gpa_codecs.errors import GpaError
from gpa_codecs.vocabulary import TokenSpace
from gpa_conformance.baseline import Baseline
from gpa_conformance.cases import Case
from gpa_conformance.context import Context, Skip
from gpa_conformance.families import FAMILIES
from gpa_conformance.isolation import ChildEngine, EngineDied
from gpa_conformance.known_failures import apply_known_failures
from gpa_conformance.limits import DtypeLimits, Limits
from gpa_conformance.results import CaseResult, Status
from gpa_conformance.speech.material import NO_DOMAIN, UTTERANCES, SpeechMaterial
from gpa_conformance.target import Target
from gpa_engines.checkpoint.speech_domain import SpeechDomain
from gpa_engines.engine import Engine, EngineInfo, GenerationRequest, TokenDelta

MOST_RESTARTS = 3
"""Times in a row that an engine may break, or fail to open, before the remaining cases are given up."""

TIME_LIMITS: Mapping[str, float] = {
    "logits": 300,
    "cache": 600,
    "batch": 300,
    "generate": 300,
    "contract": 600,
    "sampling": 600,
    "long": 900,
    "speech": 1800,
    "codec": 600,
}
"""Seconds that a case of a family may take: some ten times what the slowest known engine needs on two cores. Those of
"speech" are for the default number of utterances."""

LOAD_LIMIT = 900.0
CLOSE_LIMIT = 20.0
"""Seconds that an engine may take to load, and one in this process to close."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a session works with.

    limits_as: dtype whose limits are used instead of the engine's own. case_timeout: seconds for every case, instead of
    `TIME_LIMITS`. known: reason by case id. seed: added to the seeds of sampled cases. domain: what the checkpoint says
    that it can speak. utterances: how many of it the family "speech" takes.
    """

    target: Target
    baseline: Baseline
    limits: Limits
    cases: Mapping[str, Case]
    space: TokenSpace | None = None
    make_codec: Callable[[], SpeechCodec] | None = None
    no_codec: str = "there is no codec"
    isolate: bool = True
    limits_as: str | None = None
    case_timeout: float | None = None
    known: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    domain: SpeechDomain | None = None
    utterances: int = UTTERANCES


class Session:
    """Use as `async with Session(setup) as session: result = await session.run(case)`.

    Entering opens the engine, so that what is wrong with the target is said at once (GpaError).
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._engine: Engine | None = None
        self._info: EngineInfo | None = None
        self._limits: DtypeLimits | None = None
        self._codec: SpeechCodec | None = None
        self._speech: SpeechMaterial | None = None
        self._broken: list[str] = []

    async def __aenter__(self) -> Session:
        try:
            engine = await self._open()
            self._limits = self.setup.limits.for_dtype(self.setup.limits_as or engine.info.dtype)
        except BaseException as error:
            await self._end(gently=False)
            if isinstance(error, EngineDied):
                raise GpaError(f"{self.setup.target}: the engine could not be loaded: {error}") from error
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._codec = None
        await self._end(gently=kind is None)

    @property
    def info(self) -> EngineInfo:
        """Of the engine, also while it is not in memory."""
        assert self._info is not None
        return self._info

    @property
    def limits(self) -> DtypeLimits:
        """The limits of the engine's dtype."""
        assert self._limits is not None
        return self._limits

    async def run(self, case: Case) -> CaseResult:
        """Carry out one case; whatever goes wrong is in its result, and only Ctrl-C gets through."""
        started = time.monotonic()
        try:
            result = await self._attempt(case)
        except Skip as skip:
            result = _outcome(case, "skipped", str(skip))
        except _TimeUp:
            limit = self._time_limit(case)
            result = _outcome(case, "error", f"no result within {limit:g} s: the engine hangs, or is too slow")
        except Exception as error:
            result = _outcome(case, "error", _describe(error))
        return apply_known_failures(replace(result, seconds=time.monotonic() - started), self.setup.known)

    async def _attempt(self, case: Case) -> CaseResult:
        """Run the family's function within its time limit; an engine that this breaks is put away and counted."""
        context = await self._prepare(case)
        task = asyncio.create_task(FAMILIES[case.family](context, case))
        try:
            done, _ = await asyncio.wait({task}, timeout=self._time_limit(case))
            if not done:
                raise _TimeUp
            return task.result()
        finally:
            if not task.done():
                self._broken.append(f"{case.id} did not end in time")
                # First the process: a request that is being closed waits for its answer.
                await self._end(gently=False)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
            elif isinstance(error := task.exception(), EngineDied):
                self._broken.append(str(error))
                await self._end(gently=False)
            else:
                self._broken.clear()
                if case.kind == "close":
                    await self._end()

    async def _prepare(self, case: Case) -> Context:
        setup = self.setup
        if case.family == "codec":
            # The codec's networks and the engine's are not in memory at the same time.
            await self._end()
            engine: Engine = _EngineAway(self.info)
        else:
            if case.family != "speech":
                self._codec = None
            elif setup.domain is None:
                raise Skip(NO_DOMAIN)
            engine = self._engine or await self._reopen()
        return Context(
            engine=engine,
            baseline=setup.baseline,
            limits=self.limits,
            all_limits=setup.limits,
            space=setup.space,
            cases=setup.cases,
            make_codec=None if setup.make_codec is None else self._get_codec,
            no_codec=setup.no_codec,
            seed=setup.seed,
            speech=self._get_speech() if case.family == "speech" else None,
        )

    def _get_codec(self) -> SpeechCodec:
        if self._codec is None:
            assert self.setup.make_codec is not None
            self._codec = self.setup.make_codec()
        return self._codec

    @property
    def speech(self) -> SpeechMaterial | None:
        """What the family "speech" has worked with; None where none of its cases ran."""
        return self._speech

    def _get_speech(self) -> SpeechMaterial | None:
        """What the cases of the family share, for the whole run."""
        setup = self.setup
        if self._speech is None and setup.domain is not None and setup.space is not None:
            self._speech = SpeechMaterial(setup.domain, setup.utterances, setup.space, self._get_codec)
        return self._speech

    async def _reopen(self) -> Engine:
        if len(self._broken) >= MOST_RESTARTS:
            raise GpaError(f"given up: the engine broke {len(self._broken)} times in a row, last: {self._broken[-1]}")
        try:
            return await self._open()
        except Exception as error:
            self._broken.append(f"it could not be opened again: {error}")
            raise

    async def _open(self) -> Engine:
        target = self.setup.target
        try:
            async with asyncio.timeout(LOAD_LIMIT):
                self._engine = await (ChildEngine.start(target) if self.setup.isolate else target.open())
        except TimeoutError as error:
            raise GpaError(f"{target}: the engine was not loaded within {LOAD_LIMIT:g} s") from error
        self._info = self._engine.info
        return self._engine

    async def _end(self, *, gently: bool = True) -> None:
        """Put the engine away."""
        engine, self._engine = self._engine, None
        if isinstance(engine, ChildEngine) and not gently:
            await engine.kill()
        elif engine is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_LIMIT):
                    await engine.close()

    def _time_limit(self, case: Case) -> float:
        setup = self.setup
        times = max(1.0, setup.utterances / UTTERANCES) if case.family == "speech" else 1.0
        return setup.case_timeout or times * TIME_LIMITS[case.family]


class _TimeUp(Exception):
    """A case has used up its time."""


class _EngineAway:
    """Stands where a case needs no engine."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = info

    @property
    def info(self) -> EngineInfo:
        return self._info

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        raise AssertionError("the engine is not in memory")

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        raise AssertionError("the engine is not in memory")

    async def close(self) -> None:
        """There is nothing to close."""


def _outcome(case: Case, status: Status, reason: str) -> CaseResult:
    return CaseResult(case.id, case.family, case.title, status, reason)


def _describe(error: Exception) -> str:
    """Type, message and place of an exception that a case did not expect."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
