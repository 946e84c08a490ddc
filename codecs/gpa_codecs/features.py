"""What each encoder sees of a waveform: mel and log-mel spectrograms and the normalised samples. NumPy only.

Frames are computed in double precision: float32 tokens do not depend on which FFT library computed them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.bicodec.config import MelConfig
from gpa_codecs.glm_tokenizer.config import SAMPLES_PER_CODE, GlmFeatureConfig

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def mel_spectrogram(pcm: Float32, config: MelConfig) -> Float32:
    """The speaker encoder's input: float32[N] -> float32[num_mels, 1 + N // hop_length].

    Magnitudes, not their logarithm, of a centred Hann-windowed transform with reflected ends, in slaney mel bands.
    """
    window = np.zeros(config.n_fft)
    start = (config.n_fft - config.win_length) // 2
    window[start : start + config.win_length] = _hann(config.win_length)
    magnitudes = np.abs(_stft(pcm, window, config.hop_length))
    filters = mel_filters(config.n_fft, config.num_mels, config.mel_fmin, config.mel_fmax, config.sample_rate)
    return (filters @ magnitudes.T).astype(np.float32)


def log_mel_spectrogram(pcm: Float32, config: GlmFeatureConfig) -> tuple[Float32, int]:
    """The GLM tokenizer's input: float32[N] -> float32[feature_size, F], and how many of the F frames begin inside pcm.

    Whisper's features (Radford et al. 2022): zeros up to the next multiple of 1,280 samples, log10 of the power in
    slaney mel bands, at most 8 below the clip's own maximum, scaled to about [-1, 1]. 100 frames per second.
    """
    padded = np.zeros(-(-len(pcm) // SAMPLES_PER_CODE) * SAMPLES_PER_CODE, dtype=np.float32)
    padded[: len(pcm)] = pcm
    spectrum = _stft(padded, _hann(config.n_fft), config.hop_length)[:-1]
    power = spectrum.real**2 + spectrum.imag**2
    filters = mel_filters(config.n_fft, config.feature_size, 0.0, 8000.0, 16000)
    log_mel = np.log10(np.maximum(filters @ power.T, 1e-10))
    log_mel = np.maximum(log_mel, log_mel.max() - 8.0)
    return ((log_mel + 4.0) / 4.0).astype(np.float32), -(-len(pcm) // config.hop_length)


def normalize_samples(pcm: Float32) -> Float32:
    """wav2vec 2.0's input: zero mean and unit variance over the whole clip, float32[N] -> float32[N]."""
    return (pcm - pcm.mean()) / np.sqrt(pcm.var() + 1e-7)


@lru_cache
def mel_filters(n_fft: int, num_mels: int, fmin: float, fmax: float, sample_rate: int) -> Float64:
    """Triangular filters with equal area on the slaney mel scale: float64[num_mels, n_fft // 2 + 1].

    The scale is linear below 1 kHz and logarithmic above (Slaney, Auditory Toolbox, 1998). Frequencies in Hz.
    """
    edges = _mel_to_hertz(np.linspace(_hertz_to_mel(fmin), _hertz_to_mel(fmax), num_mels + 2))
    bins = np.linspace(0.0, sample_rate / 2, n_fft // 2 + 1)
    distance = edges[:, None] - bins[None, :]
    width = np.diff(edges)[:, None]
    rising, falling = -distance[:-2] / width[:-1], distance[2:] / width[1:]
    filters = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))[:, None]
    filters.setflags(write=False)
    return filters


def _hertz_to_mel(frequency: float) -> float:
    if frequency < 1000.0:
        return 3.0 * frequency / 200.0
    return 15.0 + np.log(frequency / 1000.0) * 27.0 / np.log(6.4)


def _mel_to_hertz(mels: Float64) -> Float64:
    return np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * np.exp((mels - 15.0) * np.log(6.4) / 27.0))


def _hann(length: int) -> Float64:
    """The periodic Hann window."""
    return 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(length) / length)


def _stft(pcm: Float32, window: Float64, hop_length: int) -> NDArray[np.complex128]:
    """complex128[1 + N // hop_length, len(window) // 2 + 1] of windows centred on every `hop_length`-th sample."""
    padded = np.pad(pcm.astype(np.float64), len(window) // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, len(window))[::hop_length]
    return np.fft.rfft(frames * window)
