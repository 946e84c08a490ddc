"""What each stage of the codec costs: every stage in a fresh process, so that it loads only what it needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from gpa_codecs.audio import SAMPLE_RATE, Waveform
from gpa_codecs.codec import HOP_LENGTH, VOICE_CARDINALITY, VOICE_LENGTH, SpeechCodec, Voice
from gpa_conformance.bench.timing import peak_rss
from gpa_engines.checkpoint.layout import BICODEC, GLM
from gpa_engines.speech.codec_files import CodecFiles, TorchCodecFiles, find_codec_files

CodecKind = Literal["torch", "onnx"]
"""What the codec runs in: torch, or its export in ONNX Runtime."""

KINDS: tuple[CodecKind, ...] = get_args(CodecKind)

Stage = Literal["semantic", "glm", "voice", "decode"]
"""semantic, glm: a clip to codes. voice: a clip to its 32 global codes. decode: codes to audio."""

STAGES: tuple[Stage, ...] = get_args(Stage)

CLIP_SECONDS = 6.0
"""Length of the clip for every stage: that of a reference clip, so that a voice is also 6 s of audio."""


class CodecStage:
    """One stage in this process. Its parts load at the first call, as they do for a user."""

    def __init__(self, model: str, stage: Stage, kind: CodecKind, device: str, threads: int) -> None:
        started = time.perf_counter()
        self._codec = codec_files(Path(model), kind).load(device, threads)
        self._open_s = time.perf_counter() - started
        self._call = _stage_call(stage, self._codec)

    def cold(self) -> dict[str, Any]:
        """The first call, loading included. open_s: imports and configuration, before the first call."""
        return self._timed() | {"open_s": self._open_s}

    def warm(self) -> dict[str, Any]:
        """One more call."""
        return self._timed()

    def _timed(self) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        self._call()
        return {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "peak_rss": peak_rss(),
        }

    def close(self) -> dict[str, Any]:
        return {}


def codec_files(model: Path, kind: CodecKind) -> CodecFiles:
    """The codec of a checkpoint folder in one of its kinds. Raises GpaError where that is not there."""
    if kind == "onnx":
        return find_codec_files(model, prefer_torch=False, precision="auto")
    return TorchCodecFiles(model / BICODEC, model / GLM)


def _stage_call(stage: Stage, codec: SpeechCodec) -> Callable[[], object]:
    if stage == "decode":
        random = np.random.default_rng(0)
        codes = random.integers(0, codec.semantic_cardinality, int(CLIP_SECONDS * SAMPLE_RATE) // HOP_LENGTH)
        voice = Voice(tuple(random.integers(0, VOICE_CARDINALITY, VOICE_LENGTH).tolist()))
        return lambda: codec.decode(codes, voice)
    clip = spoken_clip(CLIP_SECONDS)
    if stage == "voice":
        return lambda: codec.voice(clip)
    return lambda: codec.encode(clip, (stage,))


def spoken_clip(seconds: float) -> Waveform:
    """A sound with the outline of speech: a gliding pulse train with noise, four syllables a second.

    The cost of no stage depends on what is said, so that no recording is needed.
    """
    moments = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = 2 * np.pi * np.cumsum(120 + 20 * np.sin(2 * np.pi * 0.5 * moments)) / SAMPLE_RATE
    voiced = sum(np.sin(k * pitch) / k for k in range(1, 20))
    noise = np.random.default_rng(0).normal(size=len(moments))
    envelope = np.abs(np.sin(2 * np.pi * 2 * moments))
    return Waveform(0.1 * envelope * (voiced + 0.1 * noise), SAMPLE_RATE)


@dataclass(frozen=True, slots=True)
class StageResult:
    """Every sample of one stage, or why there is none. Seconds; peak_rss in bytes, of the stage's own process."""

    stage: Stage
    kind: CodecKind
    cold: dict[str, Any] | None = None
    warm: tuple[dict[str, Any], ...] = ()
    failed: str | None = None

    @property
    def peak_rss(self) -> int | None:
        return self.warm[-1]["peak_rss"] if self.warm else None
