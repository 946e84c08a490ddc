"""The pitch of a clip, by autocorrelation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.audio import SAMPLE_RATE

LOWEST, HIGHEST = 60, 400
"""Hz between which a fundamental is looked for."""

WINDOW, HOP, FFT = 800, 160, 2048
"""Samples: 50 ms every 10 ms."""

QUIET = 0.1
"""Share of the clip's mean power below which a window is not looked at."""

VOICED = 0.45
"""Normalised autocorrelation that makes a window voiced."""

FIRST_PEAK = 0.85
"""Of the highest peak: the first one as high is the period, later ones are its multiples."""

FEWEST = 3
"""Voiced windows that a pitch needs."""


def median_f0(pcm: NDArray[np.floating]) -> float:
    """Median fundamental frequency in Hz of the voiced windows of floating[N]; 0 where there are fewer than three.

    The autocorrelation of a windowed frame over that of the window (Boersma 1993), its peak refined by a parabola.
    """
    starts = np.arange(0, len(pcm) - WINDOW, HOP)
    if not len(starts):
        return 0.0
    samples = np.asarray(pcm, np.float64)
    frames = samples[starts[:, None] + np.arange(WINDOW)]
    frames = frames - frames.mean(axis=1, keepdims=True)
    power = np.square(frames).mean(axis=1)
    loud = (power > 0) & (power >= QUIET * np.square(samples).mean())
    window = np.hanning(WINDOW)
    correlation = _autocorrelation(frames[loud] * window) / _autocorrelation(window)
    correlation = correlation / correlation[:, :1]
    periods = [period for row in correlation if (period := _period(row))]
    return float(SAMPLE_RATE / np.median(periods)) if len(periods) >= FEWEST else 0.0


def _autocorrelation(frames: NDArray[np.float64]) -> NDArray[np.float64]:
    """[.., WINDOW] -> [.., WINDOW / 2], lags from 0."""
    return np.fft.irfft(np.abs(np.fft.rfft(frames, FFT)) ** 2)[..., : WINDOW // 2]


def _period(correlation: NDArray[np.float64]) -> float:
    """Samples of one period; 0 for a frame that is not voiced."""
    first = SAMPLE_RATE // HIGHEST
    lags = correlation[first : SAMPLE_RATE // LOWEST + 1]
    highest = lags.max()
    if highest < VOICED:
        return 0.0
    middle = lags[1:-1]
    peaks = np.flatnonzero((middle >= lags[:-2]) & (middle >= lags[2:]) & (middle > FIRST_PEAK * highest)) + 1
    if not len(peaks):
        return 0.0
    before, at, after = lags[peaks[0] - 1 : peaks[0] + 2]
    bend = before - 2 * at + after
    return float(first + peaks[0] + (0.5 * (before - after) / bend if bend else 0.0))
