"""Spectra as training targets, in torch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from gpa_codecs.audio import SAMPLE_RATE
from gpa_codecs.features import mel_filters

FLOOR = 0.1
"""Added to magnitudes before the logarithm: what lies below is not heard beside speech of full scale."""

_MEL_FFT = 1024


def magnitudes(waves: Tensor, n_fft: int, hop: int) -> Tensor:
    """Waveforms (B, N) -> magnitudes (B, frames, n_fft // 2 + 1), frame f centred on (f + 0.5) * hop."""
    before = n_fft // 2 - hop // 2
    padded = F.pad(waves, (before, n_fft))[:, : before + waves.shape[1] - hop // 2 + n_fft // 2]
    frames = padded.unfold(1, n_fft, hop) * _hann(n_fft, waves.device)
    spectrum = torch.fft.rfft(frames)
    # Not abs(), whose gradient at exact zeros is not a number.
    return (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()


def log_mel(waves: Tensor, mels: int, hop: int) -> Tensor:
    """Waveforms (B, N) -> logarithm of the mean magnitudes in `mels` bands: (B, frames, mels)."""
    return to_log_mel(magnitudes(waves, _MEL_FFT, hop), mels)


def to_log_mel(spectrum: Tensor, mels: int) -> Tensor:
    """Magnitudes (B, frames, bins) -> (B, frames, mels)."""
    n_fft = 2 * (spectrum.shape[-1] - 1)
    return (spectrum @ _bands(n_fft, mels, spectrum.device) + FLOOR).log()


@lru_cache
def _hann(length: int, device: torch.device) -> Tensor:
    return torch.hann_window(length, device=device)


@lru_cache
def _bands(n_fft: int, mels: int, device: torch.device) -> Tensor:
    """float32 (bins, mels): each band's weights add up to one, where it has a bin at all."""
    filters = torch.from_numpy(mel_filters(n_fft, mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE).copy()).T
    return (filters / filters.sum(0).clamp_min(1e-9)).float().to(device)
