"""Prompts and answers of the three tasks, as the product lays them out, for the language model to learn from."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo_training.corpus import VOICES
from demo_training.digits import LONGEST, written_form
from demo_training.tokens import TokenCorpus
from gpa_codecs.codec import AudioTokens, Voice
from gpa_codecs.prompts import Task, stt_prompt, tts_prompt, vc_prompt
from gpa_codecs.vocabulary import TokenSpace

Codes = NDArray[np.int64]

_DIGITS = (0.07, 0.11, 0.16, 0.2, 0.22, 0.24)  # share of the steps for each length
_WRITTEN_FORMS = 0.25
# What is heard differs from what was learned: half of the prompts have some codes replaced, lost or doubled.
_DISTURBED = 0.5
_REPLACED, _MOVED = 0.03, 0.02
_HEARD_AGAIN = 0.8  # how often a text that has an echo is heard as that
_FOREIGN_VOICE = 0.15  # share of the prompts with some global codes replaced
_FOREIGN_CODES = 4


@dataclass(frozen=True, slots=True)
class Example:
    """prompt, answer: ids; the answer ends with its stop id."""

    prompt: list[int]
    answer: list[int]


class Examples:
    """Draws batches of one task and one number of digits."""

    def __init__(self, corpus: TokenCorpus, bank: Codes, space: TokenSpace, echo: TokenCorpus | None) -> None:
        """bank: int64[voices, clips, 32], global codes of each voice. echo: the first texts of the corpus as the codec
        has spoken them.
        """
        self.space = space
        self._corpus, self._bank, self._echo = corpus, bank, echo
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for index, text in enumerate(corpus.texts):
            by_length[len(text.split())].append(index)
        self._by_length = dict(by_length)

    def batch(
        self, task: Task, size: int, rng: np.random.Generator, *, longest: int = LONGEST, echoed: float = 0.0
    ) -> list[Example]:
        """longest: digits at most. echoed: share of what is listened to that is drawn from the texts with an echo."""
        weights = np.array([_DIGITS[count - 1] if count in self._by_length else 0 for count in range(1, longest + 1)])
        digits = 1 + int(rng.choice(longest, p=weights / weights.sum()))
        make = {"stt": self._stt, "tts-a": self._tts, "vc": self._vc}[task]
        texts = self._by_length[digits]
        with_echo = [text for text in texts if self._has_echo(text)]
        drawn = []
        for _ in range(size):
            from_echo = with_echo and task != "tts-a" and rng.random() < echoed
            drawn.append(make(int(rng.choice(with_echo if from_echo else texts)), rng))
        return drawn

    def _has_echo(self, text: int) -> bool:
        return self._echo is not None and text < len(self._echo.texts)

    def _heard(self, text: int, rng: np.random.Generator) -> tuple[Codes, Codes]:
        """Semantic and GLM codes of a text in any voice, recorded or spoken by the codec."""
        row = self._row(text, int(rng.integers(len(VOICES))))
        corpus = self._corpus
        if self._echo is not None and self._has_echo(text) and rng.random() < _HEARD_AGAIN:
            corpus = self._echo
        return corpus.semantic[row], corpus.glm[row]

    def _stt(self, text: int, rng: np.random.Generator) -> Example:
        control = self.space.control
        semantic, glm = self._heard(text, rng)
        if rng.random() < _DISTURBED:
            semantic = _disturbed(semantic, self.space.semantic.size, rng)
            glm = _disturbed(glm, self.space.glm.size, rng)
        prompt = stt_prompt(self.space, AudioTokens(semantic=semantic, glm=glm, duration=0.0))
        ids = self.space.encode_text(self._corpus.texts[text])
        return Example(prompt, [*ids, control.end_content, control.im_end])

    def _tts(self, text: int, rng: np.random.Generator) -> Example:
        words = self._corpus.texts[text]
        written = written_form(words, rng) if rng.random() < _WRITTEN_FORMS else words
        voice = int(rng.integers(len(VOICES)))
        prompt = tts_prompt(self.space, written, self._voice(voice, rng))
        return Example(prompt, self._speech(self._row(text, voice)))

    def _vc(self, text: int, rng: np.random.Generator) -> Example:
        target = int(rng.integers(len(VOICES)))
        semantic, _ = self._heard(text, rng)
        if rng.random() < _DISTURBED:
            semantic = _disturbed(semantic, self.space.semantic.size, rng)
        prompt = vc_prompt(self.space, semantic, self._voice(target, rng))
        return Example(prompt, self._speech(self._row(text, target)))

    def _row(self, text: int, voice: int) -> int:
        return text * len(VOICES) + voice

    def _speech(self, row: int) -> list[int]:
        return [*self.space.semantic.ids(self._corpus.semantic[row]), self.space.control.im_end]

    def _voice(self, voice: int, rng: np.random.Generator) -> Voice:
        codes = self._bank[voice, rng.integers(self._bank.shape[1])].copy()
        if rng.random() < _FOREIGN_VOICE:
            places = rng.integers(len(codes), size=rng.integers(1, _FOREIGN_CODES + 1))
            codes[places] = rng.integers(self.space.global_.size, size=len(places))
        return Voice(tuple(codes.tolist()))


def _disturbed(codes: Codes, cardinality: int, rng: np.random.Generator) -> Codes:
    """Replace some codes by any, drop some and double some."""
    changed = np.where(rng.random(len(codes)) < _REPLACED, rng.integers(cardinality, size=len(codes)), codes)
    times = rng.choice(3, size=len(codes), p=(_MOVED, 1 - 2 * _MOVED, _MOVED))
    times[0] = max(1, times[0])
    return np.repeat(changed, times)
