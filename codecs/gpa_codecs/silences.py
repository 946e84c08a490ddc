"""Cutting long audio where it is quietest, without losing anything."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.audio import SAMPLE_RATE
from gpa_codecs.errors import AudioError

_HOP = SAMPLE_RATE // 100
"""Samples per energy value and grid of the cuts: 10 ms."""

_SHORTEST_TAIL_SECONDS = 1.0
_FLOOR_DB = 80.0
"""What lies further below the loudest 10 ms counts as equally silent."""

_PAUSE_BLOCKS = 32
"""Width of the window that pauses are looked for with, in blocks of 10 ms: the longer a pause, the more it fills."""

_LATE_BONUS_DB = 6.0
"""How much louder a pause at the end of the search range may be than one at its beginning."""


def cut_at_silences(pcm: NDArray[np.floating], max_seconds: float) -> list[slice]:
    """Cut 16 kHz audio, floating[N], where it is quietest: slices in order that cover every sample exactly once.

    No slice is longer than `max_seconds`, none but the last shorter than about half of it, and the last has at least
    1 s (half of max_seconds, if that is less). The energy of 10 ms blocks, in decibels, is smoothed over 320 ms, so
    that long pauses win over short ones and, between equals, the later one. A clip within `max_seconds` stays whole;
    an empty one gives no slices. max_seconds: at least 0.1.
    """
    if not max_seconds >= 0.1:
        raise ValueError(f"max_seconds is {max_seconds}; expected at least 0.1")
    pcm = np.asarray(pcm)
    if pcm.ndim != 1:
        raise AudioError(f"audio has shape {list(pcm.shape)}; expected mono samples [N]")
    longest = int(max_seconds * SAMPLE_RATE)
    half = longest // 2
    tail = min(int(_SHORTEST_TAIL_SECONDS * SAMPLE_RATE), half)
    if len(pcm) <= longest:
        return [slice(0, len(pcm))] if len(pcm) else []
    loudness = _loudness(pcm)
    bounds = [0]
    while len(pcm) - bounds[-1] > longest:
        start = bounds[-1]
        first = (start + half) // _HOP
        last = min(start + longest, len(pcm) - tail) // _HOP
        score = loudness[first : last + 1] - np.linspace(0, _LATE_BONUS_DB, last - first + 1)
        bounds.append(_HOP * (first + int(np.argmin(score))))
    return [slice(start, stop) for start, stop in pairwise([*bounds, len(pcm)])]


def _loudness(pcm: NDArray[np.floating]) -> NDArray[np.float64]:
    """Smoothed level around every multiple of 10 ms: float64[N // 160 + 1], decibels."""
    blocks = pcm[: len(pcm) // _HOP * _HOP].astype(np.float64).reshape(-1, _HOP)
    energy = np.mean(blocks**2, axis=1)
    level = 10 * np.log10(np.maximum(energy, max(float(energy.max()), 1e-30) * 10 ** (-_FLOOR_DB / 10)))
    window = np.hanning(_PAUSE_BLOCKS + 2)[1:-1]
    padded = np.pad(level, _PAUSE_BLOCKS // 2, mode="edge")
    return np.convolve(padded, window / window.sum(), mode="valid")
