"""The speech model: every task on one engine, as a coroutine or as a stream."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, Unpack
from weakref import WeakSet

import anyio.to_thread

from gpa_codecs.audio import AudioSource, Channel, load_audio
from gpa_codecs.codec import SpeechCodec, Voice
from gpa_codecs.prompts import Task
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.backend_choice import AUTO
from gpa_engines.checkpoint.speech_domain import SpeechDomain
from gpa_engines.engine import Engine
from gpa_engines.speech.loading import ModelFiles, find_model, parts_of
from gpa_engines.speech.results import AudioPiece, ProgressCallback, Speech, TextDelta, Transcription
from gpa_engines.speech.runtime import Runtime
from gpa_engines.speech.speaking import conversion, synthesis
from gpa_engines.speech.stream import ResultStream
from gpa_engines.speech.tasks import TASKS, SamplingOverrides
from gpa_engines.speech.transcription import transcription

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

PARALLEL_PIECES = 4
"""Pieces of one long call that share the engine's batch when nobody listens to the stream."""


class AsyncSpeechModel:
    """Transcribes, speaks and converts voices on one engine; calls may run concurrently.

    Every `stream_*` method gives a ResultStream whose parts, joined, are exactly what the plain method returns for the
    same seed. Text that is too long for one answer is split at sentence ends, audio that is too long at silences; the
    result's `pieces` say where. Keyword arguments of the tasks are the fields of SamplingParams. Errors that a user can
    cause are GpaError.
    """

    def __init__(
        self, engine: Engine, codec: SpeechCodec, space: TokenSpace, domain: SpeechDomain | None = None
    ) -> None:
        """domain: what the checkpoint can speak; other texts get a warning."""
        self._runtime = Runtime(engine, codec, space, domain)
        self._streams: WeakSet[ResultStream[Any, Any]] = WeakSet()

    @classmethod
    async def load(
        cls,
        model: str | Path,
        *,
        backend: str = AUTO,
        tasks: Collection[Task] = TASKS,
        codec: Path | None = None,
        codec_precision: str | None = None,
        bicodec: Path | None = None,
        glm_tokenizer: Path | None = None,
        tokenizer: Path | None = None,
        codec_device: str = "auto",
        **engine_options: Any,
    ) -> AsyncSpeechModel:
        """Load a checkpoint folder, a .gguf file, "demo", "tiny-random" or a hub id, which downloads it.

        backend: "auto" takes the best one that is installed (see `gpa_engines.backend_choice`). tasks: what the model
        will be used for; the checkpoint may lack the parts that only other tasks need. codec: the codec's folder where
        it is not the model's: a checkpoint, or an export of to_onnx.py; codec_precision: of an exported decoder.
        bicodec, glm_tokenizer, tokenizer: folders (for the tokenizer a file) to use instead of the checkpoint's own.
        codec_device: of a codec in torch; "auto" is a torch engine's device, else the CPU. engine_options: what the
        backend's `create_engine` takes, e.g. device, dtype, threads. The codec's parts are loaded when a task first
        needs them.
        """

        def find() -> ModelFiles:
            return find_model(
                model,
                backend=backend,
                parts=parts_of(tasks),
                codec=codec,
                codec_precision=codec_precision,
                bicodec=bicodec,
                glm_tokenizer=glm_tokenizer,
                tokenizer=tokenizer,
            )

        files = await anyio.to_thread.run_sync(find)
        return await cls.load_files(files, codec_device=codec_device, **engine_options)

    @classmethod
    async def load_files(
        cls, files: ModelFiles, *, codec_device: str = "auto", **engine_options: Any
    ) -> AsyncSpeechModel:
        """As :meth:`load`, from files that :func:`gpa_engines.speech.loading.find_model` has found and checked."""
        parts = await anyio.to_thread.run_sync(lambda: files.load(codec_device, engine_options))
        return cls(*parts, files.domain)

    @property
    def engine(self) -> Engine:
        return self._runtime.engine

    @property
    def codec(self) -> SpeechCodec:
        return self._runtime.codec

    @property
    def space(self) -> TokenSpace:
        return self._runtime.space

    async def close(self) -> None:
        """End the streams that were left open, cancel what runs and free the engine. Closing twice is harmless."""
        for stream in list(self._streams):
            # A stream that another task is reading cannot be closed from here; the engine's end will reach it.
            with suppress(RuntimeError):
                await stream.aclose()
        await self.engine.close()

    async def voice(self, audio: AudioSource, *, channel: Channel = "first") -> Voice:
        """The voice of a reference clip, to be kept and used again."""

        def read() -> Voice:
            # A source that the codec reads itself is named in the voice's origin.
            return self.codec.voice(audio if channel == "first" else load_audio(audio, channel=channel))

        return await self._runtime.in_codec(read)

    async def transcribe(
        self,
        audio: AudioSource,
        *,
        channel: Channel = "first",
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> Transcription:
        """Text of a clip of any length."""
        return await transcription(self._runtime, audio, channel, sampling, progress, PARALLEL_PIECES).drain()

    def stream_transcribe(
        self,
        audio: AudioSource,
        *,
        channel: Channel = "first",
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> ResultStream[TextDelta, Transcription]:
        """Text of a clip as it is recognised."""
        return self._opened(transcription(self._runtime, audio, channel, sampling, progress, 1))

    async def synthesize(
        self,
        text: str,
        voice: Voice | AudioSource,
        *,
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> Speech:
        """Speak a text of any length in a voice, or in the voice of a reference clip."""
        return await synthesis(self._runtime, text, voice, sampling, progress, PARALLEL_PIECES).drain()

    def stream_synthesize(
        self,
        text: str,
        voice: Voice | AudioSource,
        *,
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> ResultStream[AudioPiece, Speech]:
        """Speak a text, one group of sentences after the other."""
        return self._opened(synthesis(self._runtime, text, voice, sampling, progress, 1))

    async def convert(
        self,
        audio: AudioSource,
        voice: Voice | AudioSource,
        *,
        channel: Channel = "first",
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> Speech:
        """Say what a clip says, in another voice."""
        return await conversion(self._runtime, audio, voice, channel, sampling, progress, PARALLEL_PIECES).drain()

    def stream_convert(
        self,
        audio: AudioSource,
        voice: Voice | AudioSource,
        *,
        channel: Channel = "first",
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> ResultStream[AudioPiece, Speech]:
        """Say what a clip says in another voice, part by part."""
        return self._opened(conversion(self._runtime, audio, voice, channel, sampling, progress, 1))

    def _opened(self, stream: ResultStream[ItemT, ResultT]) -> ResultStream[ItemT, ResultT]:
        self._streams.add(stream)
        return stream
