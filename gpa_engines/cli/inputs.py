"""A command line and the files it names, checked and read before the model is loaded."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gpa_codecs.audio import SAMPLE_RATE, Waveform, check_writable, load_audio
from gpa_codecs.codec import MINIMUM_LENGTH, Voice
from gpa_codecs.errors import AudioError, TokenError
from gpa_codecs.prompts import Task, check_speakable
from gpa_engines.cli import usage
from gpa_engines.cli.options import RunOptions, flag
from gpa_engines.cli.usage import UsageError
from gpa_engines.examples import example_clip
from gpa_engines.speech.tasks import SamplingOverrides

DEFAULT_OUTPUT = Path("gpa-output.wav")

REFERENCE_OUTPUT: dict[Task, str] = {"tts-a": "output_gpa_tts_a.wav", "vc": "output_gpa_vc.wav"}
"""What the reference calls its results in --output_dir."""

OTHER_FORMATS = {".aac", ".flac", ".m4a", ".mp3", ".ogg", ".opus"}
"""File names that promise something else than the WAV that is written."""


@dataclass(frozen=True, slots=True)
class Job:
    """A command line that can run.

    task: None keeps a voice and does nothing else. source: the clip to transcribe or convert. speaker: the voice, or
    the clip that has it; speaker_name: where it comes from. output: None writes no file (stt). components: folders or
    files of the codec, or that replace the checkpoint's. codec_precision: None leaves the choice to the codec.
    """

    task: Task | None
    model: str
    backend: str
    engine_options: dict[str, Any]
    components: dict[str, Path]
    codec_precision: str | None
    sampling: SamplingOverrides
    text: str
    source: Waveform | None
    speaker: Voice | Waveform | None
    speaker_name: str
    output: Path | None
    save_voice: Path | None
    stream: bool
    json: bool
    warnings: tuple[str, ...]


def check(options: RunOptions) -> Job:
    """Read what the options name; raises GpaError for the first thing that is wrong with them."""
    task = usage.chosen_task(options)
    warnings = ()
    if task == "stt" and options.output_dir is not None:
        warnings = ("--output_dir has no effect on stt; --output FILE keeps the text",)
    return Job(
        task=task,
        model=usage.model_name(options.model),
        backend=usage.backend(options),
        engine_options=usage.engine_options(options),
        codec_precision=options.codec_precision,
        sampling=usage.sampling(options, task),
        components={name: _existing(name, path) for name in usage.COMPONENTS if (path := getattr(options, name))},
        output=_output(options, task),
        save_voice=_writable("save_voice", options.save_voice),
        source=_clip("src_audio", options) if options.src_audio is not None else None,
        speaker=_speaker(options),
        speaker_name=Path(options.ref_audio or "").name,
        text=_text(options) if task == "tts-a" else "",
        stream=options.stream,
        json=options.json,
        warnings=warnings,
    )


def _existing(name: str, path: str) -> Path:
    if not Path(path).exists():
        raise UsageError(f"{flag(name)}: {path}: there is no such file or folder")
    return Path(path)


def _output(options: RunOptions, task: Task | None) -> Path | None:
    if task in (None, "stt"):
        return _writable("output", options.output)
    if options.output_dir is not None:
        folder = Path(options.output_dir)
        if not folder.exists():
            _check_creatable(folder)
            return folder / REFERENCE_OUTPUT[task]
        return _writable("output_dir", str(folder / REFERENCE_OUTPUT[task]))
    path = _writable("output", options.output or str(DEFAULT_OUTPUT))
    if path is not None and path.suffix.lower() in OTHER_FORMATS:
        raise UsageError(
            f"--output: {path}: the audio is written as WAV; name the file {path.with_suffix('.wav').name}"
        )
    return path


def _writable(name: str, path: str | None) -> Path | None:
    if path is None:
        return None
    if path == "-" and name == "save_voice":
        raise UsageError("--save-voice needs a file; standard output belongs to the result")
    try:
        check_writable(path)
    except AudioError as error:
        raise UsageError(f"{flag(name)}: {error}") from error
    return Path(path)


def _check_creatable(folder: Path) -> None:
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    check_writable(parent / "new file")


def _clip(name: str, options: RunOptions) -> Waveform:
    path = getattr(options, name)
    channel = usage.channel(options)
    try:
        waveform = load_audio(_audio_source(path), channel=channel)
    except AudioError as error:
        raise AudioError(f"{flag(name)}: {error}") from error
    samples = len(waveform.pcm)
    if samples < MINIMUM_LENGTH:
        raise AudioError(
            f"{flag(name)}: {path} is too short: {samples} samples ({1000 * waveform.duration:.1f} ms) at "
            f"{SAMPLE_RATE} Hz; expected at least {MINIMUM_LENGTH} ({1000 * MINIMUM_LENGTH // SAMPLE_RATE} ms)"
        )
    return waveform


def _audio_source(path: str) -> Path | BinaryIO:
    if path.startswith("example:"):
        return example_clip(path)
    if path == "-":
        stream = io.BytesIO(_standard_input("audio"))
        stream.name = "standard input"
        return stream
    return Path(path)


def _speaker(options: RunOptions) -> Voice | Waveform | None:
    if options.voice is not None:
        return Voice.load(options.voice)
    if options.ref_audio is not None:
        return _clip("ref_audio", options)
    return None


def read_text(argument: str | None, file: str | None, option: str) -> tuple[str, str]:
    """(where it comes from, the text): an option's own value, a file, or standard input where either is "-"."""
    if "-" in (argument, file):
        return "standard input", _decoded(_standard_input("text"), "standard input")
    if file is not None:
        return file, _decoded(_content(file), file)
    return option, argument or ""


def _text(options: RunOptions) -> str:
    name, text = read_text(options.text, options.text_file, "--text")
    try:
        check_speakable(text)
    except TokenError as error:
        raise TokenError(f"{name}: {error}") from error
    return text


def _content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UsageError(f"--text-file: {path}: {getattr(error, 'strerror', None) or error}") from error


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _standard_input(what: str) -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError(f"standard input is closed; it was to hold the {what}")
    if sys.stdin.isatty():
        print(f"reading the {what} from standard input; end it with Ctrl-D", file=sys.stderr)
    return sys.stdin.buffer.read()
