"""A corpus of tones instead of speech, which needs no synthesiser, and a whole run of the recipe on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs torch")

from demo_training.corpus import VOICES, Corpus
from demo_training.digits import training_texts
from demo_training.dimensions import write_text_files
from demo_training.recipe import Recipe
from demo_training.tokens import TokenCorpus
from gpa_codecs.codec import HOP_LENGTH

PHONEMES = ["_", "a", "i", "u"]
_FORMANTS = {"a": (700, 1200), "i": (300, 2400), "u": (350, 800)}  # Hz
_RUN = 8  # frames that a phoneme lasts


def no_report(done: int, total: int, figures: dict[str, float]) -> None:
    """A stage's progress, unheard."""


def _tone(f0: float, names: list[str]) -> np.ndarray:
    """Harmonics of f0 around the formants of each phoneme: float64[320 * len(names)]."""
    time = np.arange(HOP_LENGTH * len(names)) / 16000
    wave = np.zeros_like(time)
    for name, formants in _FORMANTS.items():
        spoken = np.repeat([other == name for other in names], HOP_LENGTH)
        for harmonic in np.arange(f0, 4000, f0):
            level = sum(np.exp(-(((harmonic - formant) / 200) ** 2)) for formant in formants)
            wave += spoken * level * np.sin(2 * np.pi * harmonic * time)
    return 0.8 * wave / np.abs(wave).max()


@pytest.fixture(scope="session")
def tones() -> Corpus:
    """Twelve strings of three vowels and silence, each in every voice."""
    rng = np.random.default_rng(1)
    pcm, labels, lengths = [], [], []
    for _ in range(12):
        order = rng.integers(1, len(PHONEMES), size=int(rng.integers(8, 11)))
        numbers = [0, 0, *np.repeat(order, _RUN).tolist(), 0, 0]
        for voice in VOICES:
            wave = _tone(voice.f0, [PHONEMES[number] for number in numbers])
            pcm.append((wave * 32767).astype(np.int16))
            labels.append(np.array(numbers, np.uint8))
            lengths.append(len(wave))
    texts = training_texts(12, rng)
    return Corpus(texts, len(VOICES), PHONEMES, np.concatenate(pcm), np.cumsum(lengths), np.concatenate(labels))


@pytest.fixture
def recipe(tones: Corpus, tmp_path: Path) -> Recipe:
    """A run of which only the corpus is done."""
    return begun(tones, tmp_path / "run")


@pytest.fixture(scope="session")
def trained(tones: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run that has been through every stage up to the exported checkpoint, a few steps each."""
    from demo_training.encoding import glm_codes, semantic_codes
    from demo_training.stages import STAGES, run_stage

    done = begun(tones, tmp_path_factory.mktemp("trained") / "run")
    (done.out / "run.json").write_text('{"seed": 0, "scale": 0.002, "commit": "none"}')
    for name in ("semantic", "glm", "voice"):
        run_stage(STAGES[name], done, no_report)
    waves = [tones.wave(index) for index in range(len(tones))]
    TokenCorpus(tones.texts, semantic_codes(done, waves), glm_codes(done, waves)).save(done.file("tokens.npz"))
    for name in ("lm", "generator", "echo", "tuning", "export"):
        run_stage(STAGES[name], done, no_report)
    return done


def begun(tones: Corpus, out: Path, *, scale: float = 0.002) -> Recipe:
    recipe = Recipe(out, seed=0, scale=scale)
    for folder in ("stages", "work"):
        (out / folder).mkdir(parents=True)
    write_text_files(recipe.layout)
    tones.save(recipe.file("corpus.npz"))
    return recipe
