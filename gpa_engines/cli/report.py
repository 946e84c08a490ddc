"""A run as figures: the JSON document, and one line for people."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpa_engines
from gpa_codecs.codec import Voice
from gpa_engines.cli.inputs import Job
from gpa_engines.engine import EngineInfo
from gpa_engines.registry import BACKENDS
from gpa_engines.speech.loading import ModelFiles
from gpa_engines.speech.results import PieceReport, Speech, Transcription
from gpa_engines.speech.tasks import task_sampling

SCHEMA = "gpa-run/1"
"""Name of the document's layout; fields may be added under the same name, not changed or removed."""

LIBRARIES = ("numpy", "soundfile", "soxr", "tokenizers", "safetensors")


def run_report(
    job: Job, files: ModelFiles, info: EngineInfo, random_weights: bool, load: float, result: Transcription | Speech
) -> dict[str, Any]:
    """Everything needed to judge and repeat a run.

    Times are in seconds, `timings.load` is that of the language model, `rtf` is timings.total / duration. `duration` is
    that of the clip (stt) or of the audio that was made. `pieces` has one entry for each request to the model; piece k
    draws with seed + k. `sampling` is what every piece was asked for, the seed apart.
    """
    assert job.task is not None
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "task": job.task,
        "model": job.model,
        "model_dir": str(files.engine),
        "random_weights": random_weights,
        "backend": info.backend,
        "backend_choice": files.choice.reason,
        "codec": files.codec.package if files.codec else None,
        "device": info.device,
        "dtype": info.dtype,
    }
    if isinstance(result, Transcription):
        document["text"] = result.text
    document["output"] = None if job.output is None else str(job.output)
    if isinstance(result, Speech):
        document |= {"sample_rate": result.waveform.sample_rate, "voice": _voice(result.voice)}
        document["saved_voice"] = None if job.save_voice is None else str(job.save_voice)
    settings = asdict(task_sampling(job.task, job.sampling))
    del settings["seed"]
    return document | {
        "duration": result.duration,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "seed": result.seed,
        "sampling": settings,
        "pieces": [_piece(piece) for piece in result.pieces],
        "timings": {"load": load, **asdict(result.timings)},
        "rtf": result.timings.total / result.duration if result.duration else None,
        "warnings": [*job.warnings, *result.warnings],
        "versions": versions(info.backend, *([files.codec.package] if files.codec else [])),
    }


def voice_report(job: Job, model_dir: Path, voice: Voice, codec_package: str) -> dict[str, Any]:
    """What keeping a voice without a task gives. codec_package: what read the voice."""
    return {
        "schema": SCHEMA,
        "task": None,
        "model": job.model,
        "model_dir": str(model_dir),
        "voice": _voice(voice),
        "saved_voice": str(job.save_voice),
        "warnings": list(job.warnings),
        "versions": versions(None, codec_package),
    }


def summary(job: Job, result: Transcription | Speech) -> str:
    """The run in one line; a greedy run has no use for its seed."""
    assert job.task is not None
    timings = result.timings
    rate = result.new_tokens / timings.decode if timings.decode else 0.0
    parts = [f"{result.duration:.2f} s of audio", f"{result.new_tokens} tokens"]
    if rate:
        parts[-1] += f" at {rate:.1f} tok/s"
    parts.append(f"{timings.total:.2f} s of work")
    if result.duration:
        parts[-1] += f" (rtf {timings.total / result.duration:.2f})"
    if task_sampling(job.task, job.sampling).temperature > 0:
        parts.append(f"seed {result.seed}")
    return ", ".join(parts)


def versions(backend: str | None, *packages: str) -> dict[str, str]:
    """Versions of this package, Python and the libraries that shape a result, the backend's and `packages` included."""
    found = {"gpa-engines": gpa_engines.__version__, "python": platform.python_version()}
    for package in (*LIBRARIES, *(BACKENDS[backend].packages if backend else ()), *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _voice(voice: Voice) -> dict[str, Any]:
    return {"origin": voice.origin, "global_codes": list(voice.codes)}


def _piece(piece: PieceReport) -> dict[str, Any]:
    return {"source": piece.source, "finish_reason": piece.finish_reason, **asdict(piece.usage)}
