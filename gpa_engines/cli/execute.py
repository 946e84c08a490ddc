"""Doing a checked job: load, run, hand over the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from gpa_codecs.audio import Waveform
from gpa_codecs.codec import Voice
from gpa_engines.checkpoint.speech_domain import RELEASED
from gpa_engines.cli import report
from gpa_engines.cli.inputs import Job
from gpa_engines.cli.output import audio_stream, named, print_json, print_line, write_audio, write_text
from gpa_engines.cli.progress import Narrator
from gpa_engines.hub import resolve_model
from gpa_engines.random_checkpoint import is_random_checkpoint
from gpa_engines.speech import SpeechModel
from gpa_engines.speech.loading import ModelFiles, find_codec, find_model, model_folder, parts_of
from gpa_engines.speech.results import AudioPiece, Speech, TextDelta, Transcription
from gpa_engines.speech.sync import SyncStream

RANDOM_NOTE = "this checkpoint's weights are random; the output is noise"

CLOSING_TIME = 2.0
"""Seconds that an interrupted run gives the engine to close; a codec call cannot be cut short."""


def execute(job: Job, narrator: Narrator) -> None:
    """Run a job and write its result. Raises GpaError; whatever is raised, no partial file is left."""
    narrator.warn(job.warnings)
    path = resolve_model(job.model, progress=narrator.say)
    model_dir = model_folder(path)
    random_weights = is_random_checkpoint(model_dir)
    if random_weights:
        narrator.note(RANDOM_NOTE)
    if job.task is None:
        _keep_voice(job, model_dir, narrator)
        return
    narrator.stage("loading the model")
    started = time.perf_counter()
    files = find_model(
        path,
        backend=job.backend,
        parts=parts_of((job.task,)),
        codec_precision=job.codec_precision,
        **job.components,
    )
    narrator.say(f"{files.choice}; {files.codec}")
    if files.domain is not None and job.task != "tts-a":  # a text that it does not know gets a warning of its own
        narrator.note(f"{files.domain.summary}; for any speech use --model {RELEASED}")
    with _loaded(files, job) as model:
        load = time.perf_counter() - started
        info = model.info
        narrator.say(f"{info.backend} on {info.device} in {info.dtype}, loaded in {load:.1f} s")
        result = _streamed(model, job, narrator) if job.stream else _whole(model, job, narrator)
        narrator.rest()
    if isinstance(result, Speech):
        result = replace(result, voice=_named(result.voice, job))
        _save_voice(result.voice, job)
    narrator.warn(result.warnings)
    narrator.say(report.summary(job, result))
    if job.json:
        document = report.run_report(job, files, info, random_weights, load, result)
        print_json({"event": "result", **document} if job.stream else document, one_line=job.stream)
    elif isinstance(result, Speech):
        if str(job.output) != "-":
            print_line(str(job.output))
    elif not job.stream:
        print_line(result.text)


def _whole(model: SpeechModel, job: Job, narrator: Narrator) -> Transcription | Speech:
    assert job.task is not None
    progress = narrator.watch(job.task)
    if job.task == "stt":
        text = model.transcribe(_given(job.source), progress=progress, **job.sampling)
        narrator.rest()
        if job.output is not None:
            write_text(job.output, text.text + "\n")
        return text
    if job.task == "tts-a":
        speech = model.synthesize(job.text, _given(job.speaker), progress=progress, **job.sampling)
    else:
        speech = model.convert(_given(job.source), _given(job.speaker), progress=progress, **job.sampling)
    narrator.rest()
    write_audio(_given(job.output), speech.waveform)
    return speech


def _streamed(model: SpeechModel, job: Job, narrator: Narrator) -> Transcription | Speech:
    assert job.task is not None
    progress = narrator.watch(job.task, result_on_terminal=sys.stdout.isatty() and (job.json or job.task == "stt"))
    if job.task == "stt":
        return _stream_text(
            model.stream_transcribe(_given(job.source), progress=progress, **job.sampling), job, narrator
        )
    if job.task == "tts-a":
        stream = model.stream_synthesize(job.text, _given(job.speaker), progress=progress, **job.sampling)
    else:
        stream = model.stream_convert(_given(job.source), _given(job.speaker), progress=progress, **job.sampling)
    return _stream_audio(stream, job, narrator)


def _stream_text(stream: SyncStream[TextDelta, Transcription], job: Job, narrator: Narrator) -> Transcription:
    with _closed_on_error(stream):
        for delta in stream:
            narrator.rest()
            if job.json:
                print_json({"event": "text", "piece": delta.piece, "text": delta.text}, one_line=True)
            else:
                print_line(delta.text, end="")
    if not job.json:
        print_line("")
    if job.output is not None:
        write_text(job.output, stream.result.text + "\n")
    return stream.result


def _stream_audio(stream: SyncStream[AudioPiece, Speech], job: Job, narrator: Narrator) -> Speech:
    start = 0.0
    with audio_stream(_given(job.output)) as sink, _closed_on_error(stream):
        for piece in stream:
            sink.write(piece.waveform)
            if job.json:
                narrator.rest()
                print_json(_audio_event(piece, start), one_line=True)
            start += piece.waveform.duration
    return stream.result


@contextmanager
def _closed_on_error(stream: SyncStream[Any, Any]) -> Generator[None, None, None]:
    """A failure to write the stream ends it; Ctrl-C comes while it is at work, and is left to the closing engine."""
    try:
        yield
    except Exception:
        stream.close()
        raise


def _audio_event(piece: AudioPiece, start: float) -> dict[str, Any]:
    return {
        "event": "audio",
        "piece": piece.piece,
        "source": piece.source,
        "start": start,
        "duration": piece.waveform.duration,
        "new_tokens": len(piece.semantic),
    }


def _keep_voice(job: Job, model_dir: Path, narrator: Narrator) -> None:
    narrator.stage("reading the voice")
    components = {name: path for name, path in job.components.items() if name != "tokenizer"}
    files = find_codec(model_dir, ("bicodec",), codec_precision=job.codec_precision, **components)
    codec = files.load(job.engine_options.get("device", "cpu"), job.engine_options.get("threads"))
    assert isinstance(job.speaker, Waveform)
    voice = _named(codec.voice(job.speaker), job)
    narrator.rest()
    _save_voice(voice, job)
    if job.json:
        print_json(report.voice_report(job, model_dir, voice, files.package))
    else:
        print_line(str(job.save_voice))


def _save_voice(voice: Voice, job: Job) -> None:
    if job.save_voice is not None:
        with named(job.save_voice):
            voice.save(job.save_voice)


def _named(voice: Voice, job: Job) -> Voice:
    """The voice with the file that it came from."""
    return replace(voice, origin=job.speaker_name) if job.speaker_name else voice


@contextmanager
def _loaded(files: ModelFiles, job: Job) -> Generator[SpeechModel, None, None]:
    model = SpeechModel.load_files(files, **job.engine_options)
    try:
        yield model
    except KeyboardInterrupt:
        closing = Thread(target=model.close, daemon=True)
        closing.start()
        closing.join(CLOSING_TIME)
        raise
    except BaseException:
        model.close()
        raise
    model.close()


T = TypeVar("T")


def _given(value: T | None) -> T:
    """What a task cannot be without; `inputs.check` has seen to it."""
    assert value is not None
    return value
