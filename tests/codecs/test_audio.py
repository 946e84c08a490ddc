"""Audio in and out."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import gpa_codecs.audio
from gpa_codecs.audio import (
    Waveform,
    load_audio,
    normalize_volume,
    reference_clip,
    remove_dc,
)
from gpa_codecs.errors import AudioError

Arrays = Callable[[str], dict[str, np.ndarray]]

CLIPS = [
    "en_male_16k",
    "en_female_16k",
    "zh_female_16k",
    "en_female",
    "en_male",
    "stereo_44k1",
    "mono_48k_24bit",
    "mono_8k",
    "short_1600",
    "silence_16k",
    "quiet_16k",
    "loud_float_16k",
    "long_33s",
]


def tone(seconds: float = 1.0, rate: int = 16000, level: float = 0.5, channels: int = 1) -> np.ndarray:
    """A sine per channel, each at its own pitch: float64[N, channels]."""
    time = np.arange(int(seconds * rate)) / rate
    return np.stack([level * np.sin(2 * np.pi * 220 * (1 + c) * time) for c in range(channels)], axis=1)


def encoded(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


# --- ground truth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS)
def test_a_clip_is_the_recorded_waveform(
    clip: str, audio_dir: Path, goldens: dict[str, Any], golden_arrays: Arrays
) -> None:
    entry = goldens["files"][clip]
    waveform = load_audio(audio_dir / entry["path"])
    assert waveform.pcm.dtype == np.float64
    assert len(waveform.pcm) == entry["n_wav"]
    normalised = normalize_volume(waveform.pcm).astype(np.float32)
    expected = golden_arrays(clip)["wav"]
    if clip == "long_33s":
        normalised = normalised[::50]
    if entry["sr"] == 16000:
        assert np.array_equal(normalised, expected)
    else:
        np.testing.assert_allclose(normalised, expected, rtol=0, atol=1e-5)


def test_every_recorded_clip_is_covered(goldens: dict[str, Any]) -> None:
    assert set(CLIPS) | {"too_short_399"} == set(goldens["files"])


@pytest.mark.parametrize("count", [1, 3, 10, 50])
def test_dc_is_removed_as_recorded(count: int, golden_arrays: Arrays) -> None:
    arrays = golden_arrays(f"detok{count}")
    assert np.array_equal(remove_dc(arrays["wav_raw"]), arrays["wav_dc_removed"])


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["stereo_44k1.wav", "en_female.flac", "en_male.ogg", "mono_48k_24bit.wav"])
def test_every_kind_of_source_gives_the_same_samples(file: str, audio_dir: Path) -> None:
    path = audio_dir / file
    expected = load_audio(path).pcm
    samples, rate = soundfile.read(path, dtype="float64")
    first = np.asarray(samples, np.float64).reshape(len(samples), -1)[:, 0]
    with path.open("rb") as opened:
        sources = [str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), opened]
        for source in sources:
            assert np.array_equal(load_audio(source).pcm, expected)
    assert np.array_equal(load_audio(samples, sample_rate=rate).pcm, expected)
    assert np.array_equal(load_audio(Waveform(first, rate)).pcm, expected)


def test_a_file_object_is_read_from_where_it_stands(audio_dir: Path) -> None:
    content = (audio_dir / "en_male_16k.wav").read_bytes()
    file = io.BytesIO(b"header" + content)
    file.seek(6)
    assert np.array_equal(load_audio(file).pcm, load_audio(content).pcm)


def test_the_file_name_does_not_decide_the_format(audio_dir: Path, tmp_path: Path) -> None:
    disguised = tmp_path / "clip.raw"
    disguised.write_bytes((audio_dir / "en_female.flac").read_bytes())
    assert np.array_equal(load_audio(disguised).pcm, load_audio(audio_dir / "en_female.flac").pcm)


def test_mp3_survives_the_round_trip() -> None:
    samples = tone(2.0, 44100)[:, 0]
    loaded = load_audio(encoded(samples, 44100, "MP3")).pcm
    expected = load_audio(samples, sample_rate=44100).pcm
    length = min(len(loaded), len(expected))
    assert abs(len(loaded) - len(expected)) <= 1152
    assert np.corrcoef(loaded[:length], expected[:length])[0, 1] > 0.999


@pytest.mark.parametrize("kind", ["MP3", "FLAC", "WAV"])
def test_the_size_of_the_decoded_blocks_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = encoded(np.random.default_rng(0).uniform(-0.3, 0.3, 100_000), 16000, kind)
    whole = load_audio(file).pcm
    monkeypatch.setattr(gpa_codecs.audio, "_BLOCK", 9999)
    assert np.array_equal(load_audio(file).pcm, whole)


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32"])
def test_arrays_of_integers_have_the_scale_of_files(dtype: Any, audio_dir: Path) -> None:
    samples, rate = soundfile.read(audio_dir / "en_male_16k.wav", dtype=dtype)
    assert np.array_equal(load_audio(samples, sample_rate=rate).pcm, load_audio(audio_dir / "en_male_16k.wav").pcm)


def test_channels_can_be_chosen() -> None:
    samples = tone(0.1, channels=3)
    assert np.array_equal(load_audio(samples, sample_rate=16000).pcm, samples[:, 0])
    assert np.array_equal(load_audio(samples, sample_rate=16000, channel="first").pcm, samples[:, 0])
    assert np.array_equal(load_audio(samples, sample_rate=16000, channel=2).pcm, samples[:, 2])
    np.testing.assert_allclose(load_audio(samples, sample_rate=16000, channel="mean").pcm, samples.mean(axis=1))


def test_loading_does_not_alias_the_callers_array() -> None:
    samples = tone(0.1)[:, 0]
    load_audio(samples, sample_rate=16000).pcm[:] = 7
    assert np.max(np.abs(samples)) <= 1


@settings(max_examples=60, deadline=None)
@given(
    rate=st.integers(1000, 384_000),
    count=st.integers(1, 5000),
    channels=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_any_rate_and_channel_count_gives_16_khz(rate: int, count: int, channels: int, seed: int, data: Any) -> None:
    samples = np.random.default_rng(seed).uniform(-1, 1, (count, channels))
    channel = data.draw(st.sampled_from(["first", "mean", *range(channels)]))
    expected = count * 16000 / rate
    if expected < 1:
        return  # may be too short to leave a sample; tested below
    waveform = load_audio(samples, sample_rate=rate, channel=channel)
    assert waveform.sample_rate == 16000
    assert waveform.pcm.shape == (len(waveform.pcm),)
    assert abs(len(waveform.pcm) - expected) <= 1
    assert np.isfinite(waveform.pcm).all()


# --- what cannot be read ----------------------------------------------------------------------------------------------


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(AudioError) as caught:
        load_audio(*args, **kwargs)
    return str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path / "nothing.wav")
    assert "nothing.wav" in message
    assert "No such file" in message


def test_an_address_is_not_fetched() -> None:
    assert "local files only" in refused("https://example.org/clip.wav")


def test_a_folder_is_not_audio(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    assert "empty.wav: the file is empty" in refused(tmp_path / "empty.wav")
    assert refused(b"") == "<bytes>: the file is empty"


def test_a_file_without_samples_is_refused() -> None:
    assert "no samples" in refused(encoded(np.empty((0, 2)), 44100, "WAV"))
    assert "no samples" in refused(np.empty(0), sample_rate=16000)


def test_a_clip_too_short_to_resample_is_refused() -> None:
    assert "too short" in refused(np.ones(1), sample_rate=192_000)


def test_something_else_than_audio_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("this is not a sound" * 100)
    message = refused(tmp_path / "notes.wav")
    assert "notes.wav: not readable as audio (Format not recognised)" in message


def test_a_damaged_file_is_refused(audio_dir: Path) -> None:
    content = (audio_dir / "en_female.flac").read_bytes()
    assert "not readable as audio" in refused(content[:20])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_samples_are_refused_with_their_position(bad: float) -> None:
    samples = tone(1.0)[:, 0]
    samples[8000] = bad
    message = refused(encoded(samples, 16000, "WAV", "FLOAT"))
    assert f"sample 8000 (0.500 s) is {bad}" in message


def test_a_nan_in_another_channel_does_not_matter_unless_it_is_mixed_in() -> None:
    samples = tone(0.1, channels=2)
    samples[5, 1] = np.nan
    assert len(load_audio(samples, sample_rate=16000).pcm) == 1600
    assert "sample 5" in refused(samples, sample_rate=16000, channel="mean")


@pytest.mark.parametrize("channel", [2, -1, "left", 0.5])
def test_a_channel_that_is_not_there_is_refused(channel: Any) -> None:
    assert "channel" in refused(tone(0.1, channels=2), sample_rate=16000, channel=channel)


@pytest.mark.parametrize("rate", [0, -16000, 16000.5, 999])
def test_an_impossible_sample_rate_is_refused(rate: Any) -> None:
    assert f"sample rate {rate}" in refused(tone(0.1), sample_rate=rate)


def test_the_sample_rate_belongs_to_arrays(audio_dir: Path) -> None:
    assert "needs its sample_rate" in refused(tone(0.1))
    assert "carry their own rate" in refused(audio_dir / "en_male_16k.wav", sample_rate=16000)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 2, 2)), "shape [2, 2, 2]"),
        (np.zeros((2, 16000)), "transpose"),
        (np.zeros((16000, 0)), "no channels"),
        (np.zeros(100, np.uint8), "holds uint8"),
        (np.zeros(100, np.complex64), "holds complex64"),
    ],
)
def test_arrays_that_are_not_audio_are_refused(array: np.ndarray, reason: str) -> None:
    assert reason in refused(array, sample_rate=16000)


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    assert "cannot read audio from a list" in refused([0.0, 0.1])
    (tmp_path / "text.wav").write_text("text")
    with (tmp_path / "text.wav").open() as text_file:
        assert "binary mode" in refused(text_file)
    assert "text.wav" in refused(text_file)  # closed by now


# --- volume, reference clip -------------------------------------------------------------------------------------------


def test_the_volume_rule() -> None:
    def loudness(level: float) -> float:
        result = normalize_volume(tone(level=level)[:, 0])
        audible = np.sort(np.abs(result[np.abs(result) > 0.01]))
        return float(audible[int(0.9 * len(audible)) : int(0.99 * len(audible))].mean())

    assert loudness(0.5) == pytest.approx(0.2, rel=1e-3)
    assert loudness(0.15) == pytest.approx(0.2, rel=2e-2)
    assert np.max(np.abs(normalize_volume(tone(level=0.02)[:, 0]))) == pytest.approx(1.0)


def test_the_gain_is_at_least_a_tenth() -> None:
    assert np.max(np.abs(normalize_volume(tone(level=8.0)[:, 0]))) == pytest.approx(0.8)


def test_silence_stays_silence_and_near_silence_is_raised_at_most_a_hundredfold() -> None:
    assert np.array_equal(normalize_volume(np.zeros(1000)), np.zeros(1000))
    assert np.max(normalize_volume(np.full(1000, 1e-5))) == pytest.approx(1e-3)


def test_ten_audible_samples_are_too_few_for_a_volume() -> None:
    clip = np.zeros(1000)
    clip[:10] = 0.5
    assert np.array_equal(normalize_volume(clip), clip)
    clip[10] = 0.5
    assert normalize_volume(clip)[0] == pytest.approx(0.2)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-7, 3), count=st.integers(11, 3000))
def test_normalised_audio_is_finite_and_within_full_scale(seed: int, exponent: float, count: int) -> None:
    samples = np.random.default_rng(seed).normal(0, 10**exponent, count)
    before = samples.copy()
    result = normalize_volume(samples)
    assert np.isfinite(result).all()
    assert np.array_equal(samples, before)
    if np.count_nonzero(np.abs(samples) > 0.01) > 10:
        assert np.max(np.abs(result)) <= 1


def test_a_short_reference_clip_repeats() -> None:
    assert list(reference_clip(np.arange(3.0), 8)) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert list(reference_clip(np.arange(9.0), 4)) == [0, 1, 2, 3]
    assert list(reference_clip(np.arange(4.0), 4)) == [0, 1, 2, 3]


def test_empty_waveforms_have_neither_volume_nor_reference_clip() -> None:
    with pytest.raises(AudioError, match="empty"):
        normalize_volume(np.empty(0))
    with pytest.raises(AudioError, match="empty"):
        reference_clip(np.empty(0), 10)
