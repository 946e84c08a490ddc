"""Word errors, pitch and intervals: what the family "speech" counts with."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from gpa_conformance.speech.figures import Hearing, row
from gpa_conformance.speech.pitch import median_f0
from gpa_conformance.speech.words import WordErrors, word_errors
from gpa_conformance.statistics import Interval, bootstrap_ratio, error_rate, share

RATE = 16000


@pytest.mark.parametrize(
    ("expected", "heard", "errors"),
    [
        ("one two three", "one two three", (0, 0, 0)),
        ("one two three", "one four three", (1, 0, 0)),
        ("one two three", "one three", (0, 1, 0)),
        ("one two three", "one two two three", (0, 0, 1)),
        ("one two three", "", (0, 3, 0)),
        ("", "one", (0, 0, 1)),
        ("one two", "two one", (2, 0, 0)),
        ("one two three four", "two three four five", (0, 1, 1)),
        ("one", "two three four", (1, 0, 2)),
    ],
)
def test_words_are_aligned_at_the_least_cost(expected: str, heard: str, errors: tuple[int, int, int]) -> None:
    found = word_errors(expected.split(), heard.split())
    assert (found.substitutions, found.deletions, found.insertions) == errors
    assert found.count == sum(errors)
    assert found.words == len(expected.split())


def test_no_cheaper_alignment_exists() -> None:
    """Against a search over all ways, on every pair of short strings of two words."""

    def cheapest(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(cheapest(a[1:], b[1:]) + (a[0] != b[0]), cheapest(a[1:], b) + 1, cheapest(a, b[1:]) + 1)

    texts = [text for length in range(5) for text in itertools.product("ab", repeat=length)]
    for a, b in itertools.product(texts, texts):
        found = word_errors(a, b)
        assert found.count == cheapest(a, b), (a, b)
        assert len(b) == len(a) - found.deletions + found.insertions


def pulses(f0: float, seconds: float = 1.0) -> np.ndarray:
    """A train of decaying resonances, as a vowel is."""
    time = np.arange(int(seconds * RATE))
    phase = np.floor(time * f0 / RATE)
    since = time - np.ceil(phase * RATE / f0)
    return np.exp(-since / 40) * np.cos(2 * np.pi * 700 * since / RATE)


@pytest.mark.parametrize("f0", [80, 100, 150, 200, 250, 317, 380])
def test_the_pitch_of_harmonic_sounds(f0: float) -> None:
    harmonics = sum(np.sin(2 * np.pi * k * f0 * np.arange(RATE) / RATE) / k for k in range(1, 6))
    assert median_f0(np.asarray(harmonics)) == pytest.approx(f0, rel=0.01)
    assert median_f0(pulses(f0)) == pytest.approx(f0, rel=0.02)


def test_pitch_survives_pauses_loudness_dc_and_noise() -> None:
    sound = np.concatenate([np.zeros(RATE), pulses(200), np.zeros(RATE)])
    noise = np.random.default_rng(1).normal(0, 0.02, len(sound))
    for heard in (sound, 0.001 * sound, sound + 0.3, sound + noise):
        assert median_f0(heard) == pytest.approx(200, rel=0.02)


@pytest.mark.parametrize(
    "pcm",
    [np.zeros(0), np.zeros(400), np.zeros(RATE), np.full(RATE, 0.5), np.random.default_rng(2).normal(0, 0.1, RATE)],
    ids=["empty", "short", "silence", "constant", "noise"],
)
def test_what_has_no_pitch_has_none(pcm: np.ndarray) -> None:
    assert median_f0(pcm) == 0


def test_a_nan_has_no_pitch() -> None:
    assert median_f0(np.full(RATE, np.nan)) == 0


def test_a_bootstrap_interval_covers_as_often_as_it_says() -> None:
    """200 samples of 60 utterances with a known rate: 95 % intervals of a skewed count cover a little less."""
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        words = rng.integers(3, 7, 60)
        errors = rng.binomial(words, 0.08)
        found = bootstrap_ratio(errors, words, resamples=500, seed=seed)
        covered += found.low <= 0.08 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_bootstrap_knows_units_of_many_errors() -> None:
    """As many errors in few utterances leave more doubt than in many."""
    words = np.full(50, 5)
    spread = bootstrap_ratio(np.where(np.arange(50) < 20, 1, 0), words)
    lumped = bootstrap_ratio(np.where(np.arange(50) < 4, 5, 0), words)
    assert spread.value == lumped.value == 0.08
    assert lumped.high - lumped.low > 1.5 * (spread.high - spread.low)


def test_bootstraps_repeat_and_refuse_nonsense() -> None:
    assert bootstrap_ratio([1, 0, 2], [3, 4, 5]) == bootstrap_ratio([1, 0, 2], [3, 4, 5])
    many = np.arange(50) % 7, np.arange(50) % 11 + 1
    assert bootstrap_ratio(*many, seed=1) != bootstrap_ratio(*many, seed=2)
    assert math.isnan(bootstrap_ratio([], []).value)
    with pytest.raises(ValueError, match="two equal rows"):
        bootstrap_ratio([1], [1, 2])
    with pytest.raises(ValueError, match="sizes above 0"):
        bootstrap_ratio([1, 1], [1, 0])


def test_no_error_is_not_certainty() -> None:
    found = error_rate([0] * 24, [5] * 24)
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 120))
    assert share(24, 24).low == pytest.approx(0.025 ** (1 / 24))
    assert math.isnan(share(0, 0).value)


def test_hearings_are_compared_in_pairs() -> None:
    expected = [("one", "two"), ("three",), ("four", "five", "six")] * 8
    good = Hearing.of(expected, expected)
    bad = Hearing.of(expected, [words[1:] for words in expected])
    assert good.rate.value == 0
    assert bad.rate.value == 0.5
    assert (good.right, bad.right) == (24, 0)
    assert bad.beyond(bad) == Interval(0, 0, 0)
    excess = bad.beyond(good)
    assert excess.value == 0.5
    assert excess.low > 0.3
    assert good.beyond(bad).high < -0.3
    assert good.part([True, False, False] * 8).words == [2] * 8
    with pytest.raises(ValueError, match="different utterances"):
        good.beyond(Hearing((WordErrors(0, 0, 0, 1),)))


def test_a_row_holds_what_a_report_shows() -> None:
    found = row("words wrong", "share", Interval(0.1, 0.05, 0.2), "40 words", Interval(0.04, 0.01, 0.09), "wrong")
    assert found["natural_high"] == 0.09
    assert "natural" not in row("words wrong", "share", Interval(0.1, 0.05, 0.2), "40 words")
