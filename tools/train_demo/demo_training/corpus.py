"""Spoken digit strings at exact pitches, with a phoneme for every 20 ms; and the corpus that the codec learns from.

Every pitch is a multiple of 50 Hz: a generator that repeats one semantic code repeats 20 ms of audio, so exactly these
pitches come out of it without a step in the phase.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from demo_training.espeak import Espeak
from gpa_codecs.audio import SAMPLE_RATE
from gpa_codecs.codec import HOP_LENGTH
from gpa_codecs.errors import BackendError
from gpa_codecs.files import replacing
from gpa_conformance.speech.pitch import median_f0

RATE = 180
"""Words per minute."""

SILENCE = "_"

_PEAK = 0.8
_AUDIBLE = 0.003
_BEFORE, _AFTER = 480, 1280  # samples of silence that are kept around speech
_CALIBRATION = "one nine zero"
_TOLERANCE = 0.03  # how far resampling may move the pitch; more would change how the voice sounds


@dataclass(frozen=True, slots=True)
class SpeakerVoice:
    """variant: of espeak-ng, as "en-us+f1". f0: the pitch that it is brought to, in Hz."""

    name: str
    variant: str
    f0: float


VOICES = (
    SpeakerVoice("denis", "en-us+Denis", 100.0),
    SpeakerVoice("m1", "en-us+m1", 150.0),
    SpeakerVoice("f1", "en-us+f1", 200.0),
    SpeakerVoice("f2", "en-us+f2", 250.0),
)
"""The voices that the demo checkpoint knows. espeak-ng's `f4` is left out: the judge does not hear it."""

UNSEEN_VOICES = (
    SpeakerVoice("m3", "en-us+m3", 120.0),
    SpeakerVoice("m7", "en-us+m7", 100.0),
    SpeakerVoice("f3", "en-us+f3", 200.0),
    SpeakerVoice("f5", "en-us+f5", 220.0),
)
"""Voices that nothing is trained on: two at a trained pitch, two between."""


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """pcm: int16[320 * T] at 16 kHz. phonemes: T names, one for every 20 ms."""

    pcm: NDArray[np.int16]
    phonemes: list[str]


@dataclass(frozen=True, slots=True)
class _Calibration:
    pitch: int
    ratio: float


class Narrator:
    """Speaks strings in calibrated voices. What a string sounds like depends a little on what was spoken before it."""

    def __init__(self) -> None:
        """Raises BackendError without espeak-ng."""
        self._espeak = Espeak()
        self._calibrations: dict[SpeakerVoice, _Calibration] = {}

    def speak(self, text: str, voice: SpeakerVoice) -> Recording:
        """One recording. Raises BackendError for a voice that cannot be brought to its pitch."""
        if voice not in self._calibrations:
            self._calibrations[voice] = self._calibrate(voice)
        calibration = self._calibrations[voice]
        utterance = self._espeak.speak(text, voice.variant, pitch=calibration.pitch, rate=RATE)
        pcm = _resampled(utterance.pcm, utterance.sample_rate * calibration.ratio)
        audible = np.flatnonzero(np.abs(pcm) > _AUDIBLE)
        start = max(0, audible[0] - _BEFORE)
        pcm = pcm[start : audible[-1] + _AFTER]
        pcm = np.pad(pcm, (0, -len(pcm) % HOP_LENGTH))
        pcm = pcm * (_PEAK / np.abs(pcm).max())
        begins = [
            (milliseconds * 1e-3 / calibration.ratio * SAMPLE_RATE - start, name or SILENCE)
            for milliseconds, name in utterance.phonemes
        ]
        return Recording(np.rint(pcm * 32767).astype(np.int16), _frame_labels(begins, len(pcm) // HOP_LENGTH))

    def _calibrate(self, voice: SpeakerVoice) -> _Calibration:
        """espeak-ng's pitch that comes nearest, and by how much the samples must be played faster."""

        def measure(pitch: int) -> float:
            utterance = self._espeak.speak(_CALIBRATION, voice.variant, pitch=pitch, rate=RATE)
            return median_f0(_resampled(utterance.pcm, utterance.sample_rate))

        def off(pitch: int) -> float:
            f0 = measured[pitch]
            return abs(voice.f0 / f0 - 1) if f0 else np.inf

        measured = {pitch: measure(pitch) for pitch in range(0, 100, 9)}
        coarse = min(measured, key=off)
        near = range(max(0, coarse - 8), min(100, coarse + 9))
        measured |= {pitch: measure(pitch) for pitch in near if pitch not in measured}
        best = min(measured, key=off)
        if off(best) > _TOLERANCE:
            raise BackendError(
                f"espeak-ng's voice {voice.variant!r} comes no nearer to {voice.f0:g} Hz than {measured[best]:.1f} Hz"
            )
        utterance = self._espeak.speak(_CALIBRATION, voice.variant, pitch=best, rate=RATE)
        ratio = voice.f0 / measured[best]
        # The measurement is a little off at some pitches; once more at the right one removes that.
        ratio *= voice.f0 / median_f0(_resampled(utterance.pcm, utterance.sample_rate * ratio))
        return _Calibration(best, ratio)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Recordings of every text in every voice: recording `i` is text `i // voices` in voice `i % voices`.

    pcm: int16[sum of lengths]; ends: int64[recordings], in samples; labels: uint8[sum / 320], indices into `phonemes`.
    """

    texts: list[str]
    voices: int
    phonemes: list[str]
    pcm: NDArray[np.int16]
    ends: NDArray[np.int64]
    labels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Samples of each recording."""
        return np.diff(self.ends, prepend=0)

    def wave(self, index: int) -> NDArray[np.float32]:
        """float32[320 * T]."""
        end = self.ends[index]
        return np.divide(self.pcm[end - self.lengths[index] : end], 32768, dtype=np.float32)

    def frame_labels(self, index: int) -> NDArray[np.int64]:
        """int64[T], phonemes of a recording."""
        end = self.ends[index]
        return self.labels[(end - self.lengths[index]) // HOP_LENGTH : end // HOP_LENGTH].astype(np.int64)

    def voice(self, index: int) -> int:
        """Index into VOICES of a recording's speaker."""
        return index % self.voices

    def save(self, path: Path) -> None:
        """Write everything to one .npz. Raises OSError."""
        header = json.dumps({"texts": self.texts, "voices": self.voices, "phonemes": self.phonemes})
        with replacing(path) as file:
            np.savez(file, header=np.array(header), pcm=self.pcm, ends=self.ends, labels=self.labels)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """What `save` wrote."""
        with np.load(path) as stored:
            header = json.loads(str(stored["header"]))
            return cls(**header, pcm=stored["pcm"], ends=stored["ends"], labels=stored["labels"])


def record(
    narrator: Narrator,
    texts: Sequence[str],
    voices: Sequence[SpeakerVoice] = VOICES,
    progress: Callable[[int], None] = lambda done: None,
) -> Corpus:
    """Speak every text in every voice. progress: told how many texts are done."""
    recordings: list[Recording] = []
    for done, text in enumerate(texts):
        progress(done)
        recordings += [narrator.speak(text, voice) for voice in voices]
    names = sorted({name for recording in recordings for name in recording.phonemes} | {SILENCE})
    number = {name: index for index, name in enumerate(names)}
    return Corpus(
        texts=list(texts),
        voices=len(voices),
        phonemes=names,
        pcm=np.concatenate([recording.pcm for recording in recordings]),
        ends=np.cumsum([len(recording.pcm) for recording in recordings]),
        labels=np.array([number[name] for recording in recordings for name in recording.phonemes], np.uint8),
    )


def _resampled(pcm: NDArray[np.int16], rate: float) -> NDArray[np.float32]:
    return soxr.resample(pcm.astype(np.float32) / 32768, rate, SAMPLE_RATE, quality="VHQ")


def _frame_labels(begins: Sequence[tuple[float, str]], frames: int) -> list[str]:
    """The phoneme in the middle of each frame. begins: (first sample, name) in order of time."""
    middles = (np.arange(frames) + 0.5) * HOP_LENGTH
    current = np.searchsorted([begin for begin, _ in begins], middles, side="right") - 1
    return [begins[index][1] if index >= 0 else SILENCE for index in current]
