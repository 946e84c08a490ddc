"""What the encoders see, against the goldens and against transformers' and torch's own implementations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from gpa_codecs.audio import load_audio, reference_clip
from gpa_codecs.bicodec.config import BiCodecConfig, MelConfig
from gpa_codecs.features import log_mel_spectrogram, mel_filters, mel_spectrogram, normalize_samples
from gpa_codecs.glm_tokenizer.config import GlmFeatureConfig

Arrays = Callable[[str], dict[str, np.ndarray]]

CLIPS = ["en_male_16k", "en_female_16k", "stereo_44k1", "mono_8k", "short_1600", "silence_16k", "quiet_16k"]
RELEASED_MEL = MelConfig(16000, 1024, 640, 320, 10.0, 8000.0, 128)


@pytest.mark.parametrize("clip", CLIPS)
def test_mel_spectrogram_is_the_recorded_one(clip: str, tiny_checkpoint: Path, golden_arrays: Arrays) -> None:
    config = BiCodecConfig.from_file(tiny_checkpoint / "BiCodec" / "config.yaml")
    recorded = golden_arrays(clip)
    mel = mel_spectrogram(reference_clip(recorded["wav"], config.ref_segment_length).astype(np.float32), config.mel)
    assert mel.dtype == np.float32
    assert mel.shape == (config.mel.num_mels, 301)
    expected = recorded["mel_first"]
    np.testing.assert_allclose(mel[:, : expected.shape[1]], expected, rtol=1e-5, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("samples", [640, 16000, 16001, 96000])
def test_mel_spectrogram_is_torch_stft_magnitudes_in_mel_bands(samples: int) -> None:
    pcm = np.random.default_rng(1).normal(size=samples).astype(np.float32)
    window = torch.hann_window(640, dtype=torch.float64)
    stft = torch.stft(torch.from_numpy(pcm).double(), 1024, 320, 640, window, return_complex=True)
    expected = mel_filters(1024, 128, 10.0, 8000.0, 16000) @ stft.abs().numpy()
    np.testing.assert_allclose(mel_spectrogram(pcm, RELEASED_MEL), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("n_fft", "num_mels", "fmin", "fmax"), [(1024, 128, 10.0, 8000.0), (400, 128, 0.0, 8000.0), (400, 40, 0.0, 4000.0)]
)
def test_mel_filters_are_transformers_slaney_filters(n_fft: int, num_mels: int, fmin: float, fmax: float) -> None:
    expected = mel_filter_bank(n_fft // 2 + 1, num_mels, fmin, fmax, 16000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(n_fft, num_mels, fmin, fmax, 16000), expected.T, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("samples", [1280, 1281, 16000, 31885, 480000])
def test_log_mel_is_transformers_whisper_features(samples: int, audio_dir: Path) -> None:
    pcm = np.resize(load_audio(audio_dir / "en_female_16k.wav").pcm, samples).astype(np.float32)
    whisper = WhisperFeatureExtractor(feature_size=128)
    expected = whisper(
        pcm,
        sampling_rate=16000,
        padding="longest",
        pad_to_multiple_of=1280,
        return_attention_mask=True,
        return_tensors="np",
    )
    log_mel, frames = log_mel_spectrogram(pcm, GlmFeatureConfig(128, 400, 160, 480000))
    assert log_mel.dtype == np.float32
    # Where the power is at the floor of eight decades, transformers' float32 transform is noise above the fifth digit.
    np.testing.assert_allclose(log_mel, expected["input_features"][0], atol=2e-3)
    assert np.mean(np.abs(log_mel - expected["input_features"][0])) < 2e-6
    assert frames == expected["attention_mask"].sum()


def test_log_mel_of_silence_is_flat() -> None:
    log_mel, frames = log_mel_spectrogram(np.zeros(1600, np.float32), GlmFeatureConfig(40, 400, 160, 480000))
    assert log_mel.shape == (40, 16)
    assert frames == 10
    np.testing.assert_array_equal(log_mel, np.float32(-1.5))


def test_samples_are_normalised_as_transformers_does(golden_arrays: Arrays) -> None:
    pcm = golden_arrays("en_male_16k")["wav"]
    expected = Wav2Vec2FeatureExtractor(do_normalize=True)(pcm, sampling_rate=16000, return_tensors="np")
    np.testing.assert_array_equal(normalize_samples(pcm), expected["input_values"][0])


def test_features_need_no_framework() -> None:
    code = "import sys, gpa_codecs.features; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
