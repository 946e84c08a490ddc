#!/usr/bin/env python3
"""Give a checkpoint that was trained on spoken digits its speech domain: reference clips and held-out utterances.

    python tools/speech_domain.py CHECKPOINT [--utterances 240]

Writes CHECKPOINT/speech_domain.json and the clips that it names, synthesised with espeak-ng: pip install
espeakng-loader brings its library. Equal arguments and versions give equal bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from gpa_codecs.audio import SAMPLE_RATE
from gpa_codecs.codec import HOP_LENGTH
from gpa_codecs.errors import BackendError, GpaError
from gpa_conformance.speech.pitch import median_f0
from gpa_engines.checkpoint.speech_domain import SpeechDomain
from gpa_engines.checkpoint.speech_domain_writing import Speak, VoicePlan, write_speech_domain

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_DIGITS = 6
RATE = 180
"""Words per minute."""

LIMITS = (
    "It knows the ten English digits, one to six at a time, and no other word.",
    "It has heard and speaks synthetic, monotonous voices only, no human speech.",
    "A reference clip chooses one of its trained voices; another voice is not imitated.",
)

REFERENCE_TEXT = "zero nine one eight two seven"


@dataclass(frozen=True, slots=True)
class SynthesizedVoice:
    """variant: of espeak-ng, as "en-us+f1". f0: Hz, reached by its pitch parameter and a little resampling."""

    name: str
    variant: str
    f0: float


VOICES = (
    SynthesizedVoice("denis", "en-us+Denis", 100.0),
    SynthesizedVoice("m1", "en-us+m1", 150.0),
    SynthesizedVoice("f1", "en-us+f1", 200.0),
    SynthesizedVoice("f2", "en-us+f2", 250.0),
)


def write_digit_domain(
    checkpoint: str | Path,
    speak: Speak,
    utterances: int,
    voices: Sequence[SynthesizedVoice] = VOICES,
    unseen: Sequence[SynthesizedVoice] = (),
) -> SpeechDomain:
    """The domain of a checkpoint of spoken digits: `utterances` held-out strings, every voice with every length.

    speak: is given a voice's name. unseen: voices that it was not trained on, with a quarter as many strings more.
    """
    texts = held_out_texts()
    plans = [VoicePlan(each.name, each.f0, each in voices, REFERENCE_TEXT) for each in (*voices, *unseen)]
    more = utterances // 4 if unseen else 0
    pairs = [(next(texts), name) for name in (*_in_turn(voices, utterances), *_in_turn(unseen, more))]
    return write_speech_domain(
        checkpoint,
        speak,
        language="en",
        words=DIGITS,
        spellings={str(value): word for value, word in enumerate(DIGITS)},
        max_words=MAX_DIGITS,
        limits=LIMITS,
        voices=plans,
        utterances=pairs,
    )


def _in_turn(voices: Sequence[SynthesizedVoice], count: int) -> list[str]:
    """Names, each round one step on, so that a voice does not always meet the same length of string."""
    return [voices[(number + number // len(voices)) % len(voices)].name for number in range(count)]


def is_held_out(text: str) -> bool:
    """Whether a string is kept out of training: a twentieth of those of three digits and more."""
    return len(text.split()) >= 3 and zlib.crc32(text.encode()) % 20 == 0


def held_out_texts(seed: int = 0) -> Iterator[str]:
    """Distinct held-out strings of three to six digits without an end, each length as often."""
    random = np.random.default_rng(seed)
    told = {REFERENCE_TEXT}
    for length in itertools.cycle(range(3, MAX_DIGITS + 1)):
        # There are some fifty held-out strings of three digits only.
        for _ in range(10_000):
            text = " ".join(random.choice(DIGITS, length))
            if is_held_out(text) and text not in told:
                told.add(text)
                yield text
                break


class Narrator:
    """Speaks texts in voices of espeak-ng at exact pitches. The library has one state: one instance, one thread."""

    def __init__(self, voices: Sequence[SynthesizedVoice] = VOICES) -> None:
        """Raises BackendError where espeak-ng is missing, or too old for a voice."""
        self._library, self._rate = _library()
        self._voices = {voice.name: voice for voice in voices}
        self._tuning: dict[str, tuple[int, float]] = {}
        self._chunks: list[NDArray[np.int16]] = []

        def receive(samples: ctypes._Pointer, count: int, _events: int) -> int:
            if count > 0:
                self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        self._receive = _CALLBACK(receive)  # kept: the library calls it, and ctypes would forget it
        self._library.espeak_SetSynthCallback(self._receive)

    def speak(self, text: str, voice: str) -> NDArray[np.float32]:
        """float32[320 * T] at 16 kHz with a peak of 0.8, silence cut to 30 ms before and 80 ms after."""
        chosen = self._voices[voice]
        if voice not in self._tuning:
            self._tuning[voice] = self._tune(chosen)
        pitch, ratio = self._tuning[voice]
        pcm = self._synthesize(text, chosen.variant, pitch, ratio)
        loud = np.flatnonzero(np.abs(pcm) > 0.003)
        pcm = pcm[max(0, loud[0] - 480) : loud[-1] + 1280]
        pcm = np.pad(pcm, (0, -len(pcm) % HOP_LENGTH))
        return (pcm * (0.8 / np.abs(pcm).max())).astype(np.float32)

    def _tune(self, voice: SynthesizedVoice) -> tuple[int, float]:
        """The pitch parameter that comes nearest, and by how much the samples are to be played faster."""

        def measure(pitch: int, ratio: float = 1.0) -> float:
            return median_f0(self._synthesize("one nine zero", voice.variant, pitch, ratio))

        def off(pitch: int) -> float:
            return abs(np.log(measured[pitch] / voice.f0)) if measured[pitch] else np.inf

        measured = {pitch: measure(pitch) for pitch in range(0, 100, 9)}
        coarse = min(measured, key=off)
        measured |= {pitch: measure(pitch) for pitch in range(max(0, coarse - 8), min(100, coarse + 9))}
        best = min(measured, key=off)
        if off(best) > 0.05:
            raise BackendError(
                f"espeak-ng's {voice.variant} comes no nearer to {voice.f0:g} Hz than {measured[best]:.1f}"
            )
        ratio = voice.f0 / measured[best]
        return best, ratio * voice.f0 / measure(best, ratio)

    def _synthesize(self, text: str, variant: str, pitch: int, ratio: float) -> NDArray[np.float32]:
        if self._library.espeak_SetVoiceByName(variant.encode()):
            raise BackendError(f"espeak-ng has no voice {variant!r}; it needs version 1.51 or newer")
        for parameter, value in ((_SPEED, RATE), (_PITCH, pitch), (_PITCH_RANGE, 0)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        # The breath of some voices is noise, which espeak-ng seeds by the clock.
        self._library.espeak_ng_SetRandSeed(0)
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        pcm = np.concatenate(self._chunks).astype(np.float32) / 32768
        return soxr.resample(pcm, self._rate * ratio, SAMPLE_RATE, quality="VHQ")


# Of espeak-ng/speak_lib.h.
_SYNCHRONOUS, _UTF8 = 2, 1
_SPEED, _PITCH, _PITCH_RANGE = 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The library, started once in a process, and the rate of its samples in Hz."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise BackendError("speech is synthesised with espeak-ng: pip install espeakng-loader") from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, str(espeakng_loader.get_data_path()).encode(), 0)
    if rate <= 0:
        raise BackendError("espeak-ng does not start: its data are missing; reinstall espeakng-loader")
    return library, rate


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint that was trained on spoken digits")
    parser.add_argument("--utterances", type=int, default=240, metavar="N", help="held-out recordings (%(default)s)")
    given = parser.parse_args()
    if not (given.checkpoint / "config.json").is_file():
        parser.error(f"{given.checkpoint} is no checkpoint: it has no config.json")
    if not 1 <= given.utterances <= 10_000:
        parser.error(f"--utterances is {given.utterances}; expected 1 to 10000")
    try:
        domain = write_digit_domain(given.checkpoint, Narrator().speak, given.utterances)
    except GpaError as error:
        parser.error(str(error))
    print(domain.folder / "speech_domain.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
