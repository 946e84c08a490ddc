"""What espeak-ng speaks: the same samples in every process, at the pitch that was asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demo_training.corpus import VOICES, Corpus
from demo_training.pitch import median_f0
from tests.train_demo.environment import environment

TEXTS = ("three one four", "nine", "zero seven two six")

# In a process of its own: the library keeps global state, and a fault of it would end the tests.
_RECORD = """
import sys
from pathlib import Path
from demo_training.corpus import Narrator, record
from gpa_codecs.errors import BackendError
try:
    record(Narrator(), sys.argv[2:]).save(Path(sys.argv[1]))
except BackendError as error:
    print(error)
    sys.exit(77)
"""


def _recorded(path: Path, texts: tuple[str, ...]) -> Corpus:
    done = subprocess.run(
        [sys.executable, "-c", _RECORD, str(path), *texts],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )
    if done.returncode == 77 and "install" in done.stdout:
        pytest.skip(f"no synthesiser: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    return Corpus.load(path)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return _recorded(tmp_path_factory.mktemp("spoken") / "corpus.npz", TEXTS)


def test_a_string_sounds_the_same_whatever_was_spoken_before(spoken: Corpus, tmp_path: Path) -> None:
    again = _recorded(tmp_path / "again.npz", TEXTS[::-1])
    for row, text in enumerate(TEXTS):
        for voice in range(len(VOICES)):
            here, there = (corpus.texts.index(text) * len(VOICES) + voice for corpus in (spoken, again))
            assert here == row * len(VOICES) + voice
            np.testing.assert_array_equal(spoken.wave(here), again.wave(there))
            names = [corpus.phonemes for corpus in (spoken, again)]
            ours, theirs = spoken.frame_labels(here), again.frame_labels(there)
            assert [names[0][label] for label in ours] == [names[1][label] for label in theirs]


def test_every_voice_has_its_pitch(spoken: Corpus) -> None:
    for index in range(len(spoken)):
        assert median_f0(spoken.wave(index)) == pytest.approx(VOICES[spoken.voice(index)].f0, rel=0.01)


def test_frames_have_the_phonemes_that_sound(spoken: Corpus) -> None:
    for index in range(len(spoken)):
        wave, labels = spoken.wave(index), spoken.frame_labels(index)
        assert len(wave) == 320 * len(labels)
        level = np.sqrt(np.mean(wave.reshape(-1, 320) ** 2, axis=1))
        vowels = np.isin([spoken.phonemes[label] for label in labels], ["eI", "aI", "i:", "i@", "o@", "oU", "u:", "V"])
        assert level[vowels].mean() > 3 * level[~vowels].mean()


def test_the_judge_hears_the_digits(spoken: Corpus) -> None:
    pytest.importorskip("pocketsphinx", reason="the judge is pocketsphinx")
    from demo_training.judge import Judge

    judge = Judge()
    low = [index for index in range(len(spoken)) if spoken.voice(index) == 0]
    assert [judge.words(spoken.wave(index)) for index in low] == list(TEXTS)
    assert judge.words(np.zeros(1600)) == ""
