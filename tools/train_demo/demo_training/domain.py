"""The checkpoint's speech domain: its reference clips and held-out recordings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from demo_training.corpus import VOICES, Narrator, SpeakerVoice
from demo_training.digits import LONGEST, WORDS, held_out_texts
from demo_training.export import check_size
from demo_training.recipe import Recipe, Report
from gpa_engines.checkpoint.speech_domain import SpeechDomain
from gpa_engines.checkpoint.speech_domain_writing import Speak, VoicePlan, write_speech_domain

UTTERANCES = 240

_LIMITS = (
    "It knows the ten English digits, one to six at a time, and no other word.",
    "It has heard and speaks synthetic, monotonous voices only, no human speech.",
    "A reference clip chooses one of its trained voices; another voice is not imitated.",
)
_REFERENCE_TEXT = "zero nine one eight two seven"


def write_domain(recipe: Recipe, report: Report) -> None:
    """Stage `domain`: into the exported checkpoint."""
    folder = recipe.out / "checkpoint"
    count = recipe.steps(UTTERANCES)
    write_digit_domain(folder, narrating(VOICES), count)
    report(count, count, {"megabytes": check_size(folder) / 1e6})


def narrating(voices: Sequence[SpeakerVoice]) -> Speak:
    """Speaks in these voices, by their names. Equal calls in the same order give equal samples in every process."""
    narrator = Narrator()
    known = {voice.name: voice for voice in voices}
    return lambda text, name: np.divide(narrator.speak(text, known[name]).pcm, 32768, dtype=np.float32)


def write_digit_domain(
    checkpoint: str | Path,
    speak: Speak,
    utterances: int,
    voices: Sequence[SpeakerVoice] = VOICES,
    unseen: Sequence[SpeakerVoice] = (),
) -> SpeechDomain:
    """The domain of a checkpoint of spoken digits: `utterances` held-out strings, every voice with every length.

    speak: is given a voice's name. unseen: voices that it was not trained on, with a quarter as many strings more.
    """
    texts = held_out_texts(np.random.default_rng(0))
    plans = [VoicePlan(each.name, each.f0, each in voices, _REFERENCE_TEXT) for each in (*voices, *unseen)]
    more = utterances // 4 if unseen else 0
    names = [*_in_turn(voices, utterances), *_in_turn(unseen, more)]
    return write_speech_domain(
        checkpoint,
        speak,
        language="en",
        words=WORDS,
        spellings={str(value): word for value, word in enumerate(WORDS)},
        max_words=LONGEST,
        limits=_LIMITS,
        voices=plans,
        utterances=list(zip(texts, names, strict=False)),
    )


def _in_turn(voices: Sequence[SpeakerVoice], count: int) -> list[str]:
    """Names, each round one step on, so that a voice does not always meet the same length of string."""
    return [voices[(number + number // len(voices)) % len(voices)].name for number in range(count)]
