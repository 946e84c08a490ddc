"""How each task samples when nothing else is asked, and how much audio one prompt holds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypedDict

from gpa_codecs.prompts import Task
from gpa_engines.engine import SamplingParams

TASKS: tuple[Task, ...] = ("stt", "tts-a", "vc")

TRANSCRIBE_SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=512)
"""The reference transcribes greedily."""

SPEAK_SAMPLING = SamplingParams(temperature=0.2, top_k=50, repetition_penalty=1.2, max_new_tokens=512)
"""The reference's setting for speech; it leaves top_k to transformers, whose default is 50."""

LONGEST_CLIP = 30.0
"""Seconds of audio that one prompt may hold: the GLM tokenizer's block (the reference drops the rest silently)."""

CONVERT_HEADROOM = 1.25
"""Converted speech may be longer than its source by this factor before the length limit ends it."""


class SamplingOverrides(TypedDict, total=False):
    """The fields of SamplingParams that a caller may set; those left out keep the task's default."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    max_new_tokens: int
    min_new_tokens: int
    seed: int | None


def task_sampling(task: Task, overrides: SamplingOverrides, source_tokens: int = 0) -> SamplingParams:
    """A task's sampling with the caller's choices.

    source_tokens: for vc, the semantic codes of the source. Its answer is about as long, so unless max_new_tokens is
    given the limit grows with the source and never falls below the reference's 512.
    """
    sampling = TRANSCRIBE_SAMPLING if task == "stt" else SPEAK_SAMPLING
    if task == "vc":
        fitting = max(sampling.max_new_tokens, math.ceil(CONVERT_HEADROOM * source_tokens))
        sampling = replace(sampling, max_new_tokens=fitting)
    return replace(sampling, **overrides)
