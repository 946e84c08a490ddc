"""Which options belong together; needs no file and no model."""

from __future__ import annotations

import os
from typing import Any, cast

from gpa_codecs.audio import Channel
from gpa_codecs.errors import GpaError
from gpa_codecs.prompts import Task
from gpa_engines.backend_choice import AUTO
from gpa_engines.checkpoint.speech_domain import RELEASED
from gpa_engines.cli.options import MODEL_VARIABLE, RunOptions, flag
from gpa_engines.demo import DEMO
from gpa_engines.engine_options import parse_options
from gpa_engines.registry import backend_options, require_backend
from gpa_engines.servers.environment import URL_VARIABLE
from gpa_engines.speech.tasks import TASKS, SamplingOverrides, task_sampling

COMPONENTS = ("codec", "bicodec", "glm_tokenizer", "tokenizer")
"""Options that name a codec or replace a part of the checkpoint; named as `find_model` names them."""

ENGINE_OPTIONS = ("device", "dtype", "threads", "max_tokens_in_flight")
"""Options that go to the backend; named as its `create_engine` names them."""

SERVER_OPTIONS = ("url", "key_file")
"""As ENGINE_OPTIONS, for backends that have servers."""

_EXPECTED = "stt (speech to text), tts-a (text to speech), vc (voice conversion) or text (plain text)"

_VOICE_ONLY = {
    *("ref_audio", "save_voice", "channel", "model", "device", "threads", "json", "verbose", "codec_precision"),
    *COMPONENTS,
}

_MEANINGLESS: dict[Task, tuple[str, ...]] = {
    "stt": ("text", "text_file", "prompt", "ref_audio", "voice", "save_voice"),
    "tts-a": ("src_audio", "prompt"),
    "vc": ("text", "text_file", "prompt"),
}


class UsageError(GpaError):
    """Options that do not go together, or one that is missing."""


def chosen_task(options: RunOptions) -> Task | None:
    """The task, or None for keeping a voice; raises UsageError if the options do not fit it."""
    task = _task(options)
    given = options.given()
    _refuse_unsupported(given)
    if task is None:
        for name in sorted(given - _VOICE_ONLY):
            raise UsageError(f"{flag(name)} needs --task; to keep a voice, --save-voice and --ref-audio are enough")
    else:
        for name in _MEANINGLESS[task]:
            if name in given:
                raise UsageError(f"{flag(name)} means nothing with --task {task}; leave it out")
    _require(options, given, task)
    _refuse_pairs(options, given)
    return task


def model_name(name: str | None) -> str:
    """The model that was named by option or else in the environment, else the demo checkpoint; raises UsageError for an
    empty name.
    """
    if name is None:
        return os.environ.get(MODEL_VARIABLE) or DEMO
    if not name:
        raise UsageError(
            f"--model is empty; expected a checkpoint folder, the hub id {RELEASED} (downloads the released weights) "
            f"or {DEMO} (spoken digits, as without --model)"
        )
    return name


def backend(options: RunOptions) -> str:
    """The backend's name, or "auto"; raises BackendError for one that cannot be used here."""
    name = options.backend or AUTO
    return AUTO if name == AUTO else require_backend(name).name


def sampling(options: RunOptions, task: Task | None) -> SamplingOverrides:
    """The sampling options that were given; raises RequestError for a value out of range."""
    values = {name: getattr(options, name) for name in SamplingOverrides.__annotations__}
    overrides = cast(SamplingOverrides, {name: value for name, value in values.items() if value is not None})
    if task is not None:
        task_sampling(task, overrides)
    return overrides


def engine_options(options: RunOptions) -> dict[str, Any]:
    """The backend options that were given; the backend itself judges device and dtype."""
    chosen = backend(options)
    for name in SERVER_OPTIONS:
        if getattr(options, name) and (chosen == AUTO or name not in backend_options(chosen)):
            raise UsageError(f"{flag(name)} is for --backend remote; give that, or leave {flag(name)} out")
    if options.backend == "remote" and not (options.url or os.environ.get(URL_VARIABLE)):
        raise UsageError(
            f"--backend remote needs --url http://host:8000, once per server, or {URL_VARIABLE} in the environment"
        )
    for name in ("threads", "max_tokens_in_flight"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag(name)} is {value}; expected at least 1")
    known = (*ENGINE_OPTIONS, *SERVER_OPTIONS)
    named = {name: value for name in known if (value := getattr(options, name)) is not None}
    return named | parse_options(options.option or (), {name: flag(name) for name in known})


def channel(options: RunOptions) -> Channel:
    """--channel as `load_audio` takes it."""
    if options.channel is None or options.channel == "first":
        return "first"
    if options.channel == "mean":
        return "mean"
    if not options.channel.isdecimal():
        raise UsageError(f"--channel is {options.channel!r}; expected first, mean or a number from 0")
    return int(options.channel)


def _task(options: RunOptions) -> Task | None:
    for task in TASKS:
        if options.task == task:
            return task
    if options.task is not None:
        raise UsageError(f"unknown task {options.task!r}; expected {_EXPECTED}")
    if options.save_voice is None:
        raise UsageError(f"--task is missing; expected {_EXPECTED}")
    return None


def _refuse_unsupported(given: set[str]) -> None:
    for name in ("ref_transcript", "auto_ref_transcript"):
        if name in given:
            raise UsageError(
                f"--{name} is not supported: the prompt of tts-a has no place for a reference transcript; "
                f"leave it out, the voice comes from --ref-audio alone"
            )


def _require(options: RunOptions, given: set[str], task: Task | None) -> None:
    if task in ("stt", "vc") and "src_audio" not in given:
        raise UsageError(f"--task {task} needs --src-audio FILE")
    if task == "tts-a" and not given & {"text", "text_file"}:
        raise UsageError("--task tts-a needs a text: --text TEXT or --text-file FILE (- reads standard input)")
    if task in ("tts-a", "vc") and not given & {"ref_audio", "voice"}:
        raise UsageError(f"--task {task} needs a voice: --ref-audio CLIP or --voice FILE")
    if "save_voice" in given and "ref_audio" not in given:
        raise UsageError("--save-voice keeps the voice of a clip: give --ref-audio CLIP")


def _refuse_pairs(options: RunOptions, given: set[str]) -> None:
    for first, second, reason in (
        ("ref_audio", "voice", "a run has one voice"),
        ("text", "text_file", "a run speaks one text"),
        ("output", "output_dir", "a run has one output"),
    ):
        if first in given and second in given:
            raise UsageError(f"both {flag(first)} and {flag(second)} were given; {reason}")
    if options.json and options.output == "-":
        raise UsageError("both --json and --output - write to standard output; name an output file")
    if options.save_voice is not None and options.save_voice == options.output:
        raise UsageError("--save-voice and --output name the same file; a voice is kept as JSON, not as audio")
    sources = [name for name in ("text", "text_file", "src_audio", "ref_audio") if getattr(options, name) == "-"]
    if len(sources) > 1:
        raise UsageError(f"both {flag(sources[0])} and {flag(sources[1])} read standard input; only one can")
