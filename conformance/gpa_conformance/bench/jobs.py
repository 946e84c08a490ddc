"""Real jobs, each in a fresh process: load, transcribe or speak, and the peak memory that it took."""

from __future__ import annotations

import time
from typing import Any, Literal, get_args

from gpa_conformance.bench.codec import CLIP_SECONDS, spoken_clip
from gpa_conformance.bench.timing import peak_rss
from gpa_engines.registry import backend_options
from gpa_engines.speech import SpeechModel

Job = Literal["tts-a", "stt"]

JOBS: tuple[Job, ...] = get_args(Job)

JOB_TEXT = "The quick brown fox jumps over the lazy dog."

JOB_TOKENS = 100
"""New tokens of a job, forced whatever the weights are: two seconds of speech."""


class SpeechJob:
    """One task through SpeechModel, as `gpa-run` does it."""

    def __init__(
        self, model: str, job: Job, backend: str, dtype: str, device: str, threads: int, options: dict[str, Any]
    ) -> None:
        self._model = model
        self._job: Job = job
        self._backend = backend
        self._dtype = dtype
        self._offered = {"device": device, "threads": threads}
        self._options = options

    def run(self) -> dict[str, Any]:
        """Load and run once; seconds and bytes. audio_s: heard or made."""
        started, cpu = time.perf_counter(), time.process_time()
        known = backend_options(self._backend)
        options = {name: value for name, value in self._offered.items() if name in known} | self._options
        with SpeechModel.load(self._model, backend=self._backend, dtype=self._dtype, **options) as model:
            loaded, loaded_rss = time.perf_counter(), peak_rss()
            clip = spoken_clip(CLIP_SECONDS)
            if self._job == "stt":
                result = model.transcribe(clip, max_new_tokens=JOB_TOKENS, min_new_tokens=JOB_TOKENS)
            else:
                result = model.synthesize(JOB_TEXT, clip, max_new_tokens=JOB_TOKENS, min_new_tokens=JOB_TOKENS, seed=0)
            ended = time.perf_counter()
        return {
            "load_s": loaded - started,
            "task_s": ended - loaded,
            "cpu_s": time.process_time() - cpu,
            "audio_s": result.duration,
            "prompt_tokens": result.prompt_tokens,
            "new_tokens": result.new_tokens,
            "peak_rss_loaded": loaded_rss,
            "peak_rss": peak_rss(),
        }

    def close(self) -> dict[str, Any]:
        return {}
