"""Long audio is cut in its pauses, and no sample of it is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpa_codecs.audio import load_audio
from gpa_codecs.errors import AudioError
from gpa_codecs.silences import cut_at_silences


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(0, 200_000),
    max_seconds=st.floats(0.1, 5),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["noise", "silence", "bursts"]),
)
def test_slices_cover_the_clip_within_the_limits(count: int, max_seconds: float, seed: int, kind: str) -> None:
    pcm = np.random.default_rng(seed).normal(0, 0.1, count)
    if kind == "silence":
        pcm[:] = 0
    elif kind == "bursts":
        pcm *= np.sin(np.arange(count) / 3000) > 0.5
    slices = cut_at_silences(pcm, max_seconds)
    assert np.array_equal(np.concatenate([pcm[part] for part in slices]) if slices else pcm[:0], pcm)
    lengths = [part.stop - part.start for part in slices]
    assert max(lengths, default=0) <= max_seconds * 16000
    if len(slices) > 1:
        assert min(lengths) >= 400
        assert lengths[-1] >= min(16000, int(max_seconds * 16000) // 2)
    assert slices == cut_at_silences(pcm.copy(), max_seconds)


def test_audio_is_cut_in_the_middle_of_the_longest_pause() -> None:
    rng = np.random.default_rng(0)
    pcm = rng.normal(0, 0.1, 16000 * 40)
    pauses = {18.0: 0.15, 22.0: 0.6, 26.0: 0.15}
    for start, length in pauses.items():
        pcm[int(start * 16000) : int((start + length) * 16000)] *= 0.001
    first, second = cut_at_silences(pcm, 30)
    assert 22.1 < first.stop / 16000 < 22.5
    assert second == slice(first.stop, len(pcm))


def test_of_equal_pauses_the_later_is_taken() -> None:
    pcm = np.random.default_rng(0).normal(0, 0.1, 16000 * 50)
    for start in (17, 21, 25, 28):
        pcm[start * 16000 : start * 16000 + 8000] = 0
    assert 28 < cut_at_silences(pcm, 30)[0].stop / 16000 < 28.5


def test_no_tiny_piece_is_left_at_the_end() -> None:
    pcm = np.random.default_rng(0).normal(0, 0.1, 16000 * 30 + 1)
    lengths = [part.stop - part.start for part in cut_at_silences(pcm, 30)]
    assert len(lengths) == 2
    assert min(lengths) >= 16000


def test_recorded_speech_is_cut_in_its_pauses(audio_dir: Path) -> None:
    pcm = load_audio(audio_dir / "long_33s.wav").pcm
    for max_seconds in (30, 10):
        slices = cut_at_silences(pcm, max_seconds)
        assert slices == cut_at_silences(pcm, max_seconds)
        for part in slices[:-1]:
            around = pcm[part.stop - 800 : part.stop + 800]
            assert np.sqrt(np.mean(around**2)) < 0.01 * np.sqrt(np.mean(pcm**2))


def test_a_clip_within_the_limit_stays_whole() -> None:
    assert cut_at_silences(np.zeros(480_000), 30) == [slice(0, 480_000)]
    assert cut_at_silences(np.zeros(10), 30) == [slice(0, 10)]
    assert cut_at_silences(np.zeros(0), 30) == []


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="max_seconds"):
        cut_at_silences(np.zeros(10), 0.05)
    with pytest.raises(AudioError, match=r"shape \[10, 2\]"):
        cut_at_silences(np.zeros((10, 2)), 30)
