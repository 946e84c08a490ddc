"""An engine, a codec and a token space, and the two steps that every task is made of: encode and generate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

import anyio
import anyio.to_thread

from gpa_codecs.audio import AudioSource, Waveform
from gpa_codecs.codec import AudioTokens, Codes, Family, SpeechCodec, Voice
from gpa_codecs.errors import RequestError
from gpa_codecs.prompts import Task, task_tokens
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.checkpoint.speech_domain import SpeechDomain
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams
from gpa_engines.passing_thread import in_passing_thread
from gpa_engines.speech.call import Call
from gpa_engines.speech.results import ProgressCallback
from gpa_engines.speech.tasks import SamplingOverrides, task_sampling

T = TypeVar("T")


class Runtime:
    """Codec calls take turns on a worker thread, since each of them uses all of its threads; the engine batches."""

    def __init__(
        self, engine: Engine, codec: SpeechCodec, space: TokenSpace, domain: SpeechDomain | None = None
    ) -> None:
        self.domain = domain
        self.engine = engine
        self.codec = codec
        self.space = space
        self._codec_turn = anyio.CapacityLimiter(1)

    def begin(self, task: Task, overrides: SamplingOverrides, progress: ProgressCallback | None) -> Call:
        """A call, with a remark where its seed will not repeat what it draws."""
        call = Call.begin(overrides, progress)
        if warning := self.engine.info.seed_warning(task_sampling(task, overrides)):
            call.remarks.append(warning)
        return call

    async def in_codec(self, function: Callable[[], T]) -> T:
        """Run a blocking codec or audio function off the event loop."""
        return await anyio.to_thread.run_sync(in_passing_thread, function, limiter=self._codec_turn)

    async def encode(self, call: Call, waveform: Waveform, *families: Family) -> AudioTokens:
        """Codes of a loaded clip, its time added to the call."""
        started = time.perf_counter()
        tokens = await self.in_codec(lambda: self.codec.encode(waveform, families))
        call.encode += time.perf_counter() - started
        return tokens

    async def speaker(self, call: Call, voice: Voice | AudioSource) -> Voice:
        """The voice itself, or that of a reference clip."""
        if isinstance(voice, Voice):
            return voice
        started = time.perf_counter()
        speaker = await self.in_codec(lambda: self.codec.voice(voice))
        call.encode += time.perf_counter() - started
        return speaker

    async def decode(self, call: Call, semantic: Codes, voice: Voice) -> Waveform:
        """Audio of codes, its time added to the call."""
        call.tell("codec")
        started = time.perf_counter()
        waveform = await self.in_codec(lambda: self.codec.decode(semantic, voice))
        call.codec += time.perf_counter() - started
        return waveform

    async def generate(
        self,
        call: Call,
        index: int,
        source: str,
        task: Task,
        prompt: Sequence[int],
        sampling: SamplingParams,
        deliver: Callable[[Sequence[int]], None],
    ) -> None:
        """Continue one piece's prompt, handing over new ids as they come; the piece's report goes into the call."""
        stop_ids, allowed = task_tokens(self.space, task)
        sampling = replace(sampling, seed=call.piece_seed(index))
        request = GenerationRequest(tuple(prompt), sampling, stop_ids, allowed)
        async with aclosing(self.engine.generate(request)) as deltas:
            async for delta in deltas:
                call.count_tokens(len(delta.ids))
                deliver(delta.ids)
                if delta.finish_reason == "cancelled":
                    raise RequestError("the engine was closed while it was generating")
                if delta.finish_reason is not None and delta.usage is not None:
                    call.end_piece(index, source, delta.finish_reason, delta.usage, sampling.max_new_tokens)
