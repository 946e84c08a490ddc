"""The pitch of a clip, by autocorrelation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_RATE = 16000
_WINDOW, _HOP, _FFT = 800, 160, 2048
_LOWEST, _HIGHEST = 60, 400  # Hz
_QUIET = 0.1  # share of the clip's mean power below which a window is not looked at
_VOICED = 0.45  # normalised autocorrelation of a voiced window
_FIRST_PEAK = 0.85  # of the highest: the first such peak is the period, a later one its multiple
_FEWEST = 3  # voiced windows


def median_f0(pcm: NDArray[np.floating]) -> float:
    """Median fundamental frequency of the voiced windows of a clip at 16000 Hz, in Hz; 0 where too few are voiced.

    The autocorrelation is divided by that of the window (Boersma 1993), and the peak interpolated by a parabola.
    """
    window = np.hanning(_WINDOW)
    window_correlation = _autocorrelation(window)
    power = float(np.mean(np.square(pcm, dtype=np.float64)))
    periods = []
    for start in range(0, len(pcm) - _WINDOW, _HOP):
        frame = np.asarray(pcm[start : start + _WINDOW], np.float64)
        frame = frame - frame.mean()
        if np.mean(frame**2) >= _QUIET * power and (period := _period(frame * window, window_correlation)):
            periods.append(period)
    return float(np.median(_RATE / np.asarray(periods))) if len(periods) >= _FEWEST else 0.0


def _autocorrelation(frame: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.fft.irfft(np.abs(np.fft.rfft(frame, _FFT)) ** 2)[: _WINDOW // 2]


def _period(frame: NDArray[np.float64], window_correlation: NDArray[np.float64]) -> float:
    """Samples of one period of a windowed frame; 0 where it is not voiced."""
    correlation = _autocorrelation(frame) / window_correlation
    correlation = correlation / (correlation[0] + 1e-12)
    first = _RATE // _HIGHEST
    lags = correlation[first : _RATE // _LOWEST]
    highest = lags.max()
    if highest < _VOICED:
        return 0.0
    middle = lags[1:-1]
    peaks = np.flatnonzero((middle >= lags[:-2]) & (middle >= lags[2:]) & (middle > _FIRST_PEAK * highest)) + 1
    if not len(peaks):
        return 0.0
    peak = int(peaks[0])
    before, at, after = lags[peak - 1 : peak + 2]
    return first + peak + 0.5 * (before - after) / (before - 2 * at + after - 1e-12)
