"""The speech model for callers without an event loop: a command line, a notebook, a script."""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar, Unpack

from anyio.from_thread import BlockingPortal, start_blocking_portal

from gpa_codecs.audio import AudioSource, Channel
from gpa_codecs.codec import Voice
from gpa_codecs.errors import RequestError
from gpa_codecs.prompts import Task
from gpa_engines.backend_choice import AUTO
from gpa_engines.engine import EngineInfo
from gpa_engines.speech.loading import ModelFiles
from gpa_engines.speech.model import AsyncSpeechModel
from gpa_engines.speech.results import AudioPiece, ProgressCallback, Speech, TextDelta, Transcription
from gpa_engines.speech.stream import ResultStream
from gpa_engines.speech.tasks import TASKS, SamplingOverrides

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class SyncStream(Generic[ItemT, ResultT]):
    """A ResultStream read from ordinary code: iterate, then take `result`. Closing it early cancels what still runs."""

    def __init__(self, stream: ResultStream[ItemT, ResultT], portal: BlockingPortal) -> None:
        self._stream = stream
        self._portal = portal

    def __iter__(self) -> Iterator[ItemT]:
        return self

    def __next__(self) -> ItemT:
        try:
            return self._portal.call(self._stream.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """Cancel what still runs."""
        self._portal.call(self._stream.aclose)

    @property
    def result(self) -> ResultT:
        """The whole result; RuntimeError before the last part has been taken."""
        return self._stream.result


class SpeechModel:
    """AsyncSpeechModel behind blocking calls; use it in a `with` block, or call `close`.

    >>> with SpeechModel.load("path/to/checkpoint") as model:
    ...     print(model.transcribe("clip.wav").text)

    Methods may be called from several threads; their requests then share the engine's batch. The meaning of every
    method and argument is AsyncSpeechModel's.
    """

    def __init__(self, model: AsyncSpeechModel, runner: AbstractContextManager[BlockingPortal], portal: BlockingPortal):
        self._model = model
        self._portal = portal
        # Also runs when the model is forgotten or the interpreter exits: the portal would wait for its dead loop then.
        self._close = weakref.finalize(self, _close, model, runner, portal)

    @classmethod
    def load(
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
    ) -> SpeechModel:
        """As AsyncSpeechModel.load."""

        async def load() -> AsyncSpeechModel:
            return await AsyncSpeechModel.load(
                model,
                backend=backend,
                tasks=tasks,
                codec=codec,
                codec_precision=codec_precision,
                bicodec=bicodec,
                glm_tokenizer=glm_tokenizer,
                tokenizer=tokenizer,
                codec_device=codec_device,
                **engine_options,
            )

        return cls._started(load)

    @classmethod
    def load_files(cls, files: ModelFiles, *, codec_device: str = "auto", **engine_options: Any) -> SpeechModel:
        """As AsyncSpeechModel.load_files."""

        async def load() -> AsyncSpeechModel:
            return await AsyncSpeechModel.load_files(files, codec_device=codec_device, **engine_options)

        return cls._started(load)

    @classmethod
    def _started(cls, load: Callable[[], Awaitable[AsyncSpeechModel]]) -> SpeechModel:
        runner = start_blocking_portal()
        portal = runner.__enter__()
        try:
            return cls(portal.call(load), runner, portal)
        except BaseException:
            runner.__exit__(None, None, None)
            raise

    def __enter__(self) -> SpeechModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs, free the engine and end the event loop. Closing twice is harmless."""
        self._close()

    def _call(self, function: Callable[[], Awaitable[ResultT]]) -> ResultT:
        if not self._close.alive:
            raise RequestError("the model is closed; load it again")
        return self._portal.call(function)

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._model.engine.info

    def voice(self, audio: AudioSource, *, channel: Channel = "first") -> Voice:
        """As AsyncSpeechModel.voice."""
        return self._call(lambda: self._model.voice(audio, channel=channel))

    def transcribe(
        self,
        audio: AudioSource,
        *,
        channel: Channel = "first",
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> Transcription:
        """As AsyncSpeechModel.transcribe."""
        return self._call(lambda: self._model.transcribe(audio, channel=channel, progress=progress, **sampling))

    def stream_transcribe(
        self,
        audio: AudioSource,
        *,
        channel: Channel = "first",
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> SyncStream[TextDelta, Transcription]:
        """As AsyncSpeechModel.stream_transcribe."""
        stream = self._model.stream_transcribe(audio, channel=channel, progress=progress, **sampling)
        return SyncStream(stream, self._portal)

    def synthesize(
        self,
        text: str,
        voice: Voice | AudioSource,
        *,
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> Speech:
        """As AsyncSpeechModel.synthesize."""
        return self._call(lambda: self._model.synthesize(text, voice, progress=progress, **sampling))

    def stream_synthesize(
        self,
        text: str,
        voice: Voice | AudioSource,
        *,
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> SyncStream[AudioPiece, Speech]:
        """As AsyncSpeechModel.stream_synthesize."""
        return SyncStream(self._model.stream_synthesize(text, voice, progress=progress, **sampling), self._portal)

    def convert(
        self,
        audio: AudioSource,
        voice: Voice | AudioSource,
        *,
        channel: Channel = "first",
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> Speech:
        """As AsyncSpeechModel.convert."""
        return self._call(lambda: self._model.convert(audio, voice, channel=channel, progress=progress, **sampling))

    def stream_convert(
        self,
        audio: AudioSource,
        voice: Voice | AudioSource,
        *,
        channel: Channel = "first",
        progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOverrides],
    ) -> SyncStream[AudioPiece, Speech]:
        """As AsyncSpeechModel.stream_convert."""
        stream = self._model.stream_convert(audio, voice, channel=channel, progress=progress, **sampling)
        return SyncStream(stream, self._portal)


def _close(model: AsyncSpeechModel, runner: AbstractContextManager[BlockingPortal], portal: BlockingPortal) -> None:
    try:
        portal.call(model.close)
    finally:
        runner.__exit__(None, None, None)
