"""Word errors and their intervals; pitch."""

from __future__ import annotations

import numpy as np
import pytest

from demo_training.judge import WordErrors, edit_distance
from demo_training.pitch import median_f0


@pytest.mark.parametrize(
    ("reference", "heard", "errors"),
    [
        ("one two three", "one two three", 0),
        ("one two three", "one three", 1),
        ("one two", "one five two", 1),
        ("one two three", "", 3),
        ("one two three four", "two three four one", 2),
    ],
)
def test_counts_the_fewest_changes(reference: str, heard: str, errors: int) -> None:
    assert edit_distance(reference.split(), heard.split()) == errors


def test_the_interval_holds_the_rate_and_shrinks() -> None:
    references = ["one two three four"] * 100
    heard = ["one two three four"] * 90 + ["one two three"] * 10
    few, many = WordErrors.of(references, heard), WordErrors.of(references * 9, heard * 9)
    assert few.rate == many.rate == pytest.approx(0.025)
    (low, high), (nearer, farther) = few.interval(), many.interval()
    assert low < nearer < 0.025 < farther < high
    assert few.interval(against=few) == (0.0, 0.0)


def test_the_distance_of_two_conditions_is_by_utterance() -> None:
    references = ["one two three four"] * 50
    first = WordErrors.of(references, ["one two three"] * 50)
    second = WordErrors.of(references, ["one two"] * 50)
    assert second.interval(first) == (0.25, 0.25)


@pytest.mark.parametrize("f0", [80.0, 147.0, 250.0, 333.0])
def test_finds_the_pitch_of_harmonics(f0: float) -> None:
    time = np.arange(8000) / 16000
    wave = sum(np.sin(2 * np.pi * f0 * harmonic * time) / harmonic for harmonic in range(1, 8))
    assert median_f0(np.asarray(wave)) == pytest.approx(f0, rel=0.01)


def test_noise_and_silence_have_no_pitch() -> None:
    assert median_f0(np.random.default_rng(0).normal(size=8000)) == 0
    assert median_f0(np.zeros(8000)) == 0
