"""What espeak-ng speaks: the same samples in every process, at the pitch that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from demo_training.corpus import VOICES, Corpus
from demo_training.digits import WORDS
from demo_training.narration import narrate
from gpa_conformance.speech.pitch import median_f0
from gpa_conformance.speech.recogniser import find_recogniser

TEXTS = ("three one four", "nine", "zero seven two six")


@pytest.fixture(scope="module")
def spoken() -> Corpus:
    pytest.importorskip("espeakng_loader", reason="speech is synthesised with espeak-ng: pip install espeakng-loader")
    return narrate(TEXTS)


def test_the_same_strings_sound_the_same_in_every_process(spoken: Corpus) -> None:
    again = narrate(TEXTS)
    assert spoken.texts == again.texts == list(TEXTS)
    np.testing.assert_array_equal(spoken.pcm, again.pcm)
    np.testing.assert_array_equal(spoken.ends, again.ends)
    np.testing.assert_array_equal(spoken.labels, again.labels)


def test_every_voice_has_its_pitch(spoken: Corpus) -> None:
    for index in range(len(spoken)):
        assert median_f0(spoken.wave(index)) == pytest.approx(VOICES[spoken.voice(index)].f0, rel=0.01)


def test_frames_have_the_phonemes_that_sound(spoken: Corpus) -> None:
    vowels, silence = [], []
    for index in range(len(spoken)):
        wave, labels = spoken.wave(index), spoken.frame_labels(index)
        assert len(wave) == 320 * len(labels)
        level = np.sqrt(np.mean(wave.reshape(-1, 320) ** 2, axis=1))
        names = [spoken.phonemes[label] for label in labels]
        vowels.append(level[np.isin(names, ["eI", "aI", "i:", "i@", "o@", "oU", "u:", "V"])])
        silence.append(level[np.isin(names, ["_", "_:"])])
    assert np.median(np.concatenate(vowels)) > 4 * np.median(np.concatenate(silence))


def test_the_judge_hears_the_digits(spoken: Corpus) -> None:
    pytest.importorskip("pocketsphinx", reason="the judge is pocketsphinx")
    judge, _ = find_recogniser(WORDS, "en")
    assert judge is not None
    low = [index for index in range(len(spoken)) if spoken.voice(index) == 0]
    assert [" ".join(judge.hear(spoken.wave(index))) for index in low] == list(TEXTS)
