"""A checkpoint that can speak, without training: a codec whose codes are words, and an engine that hears and says them.

The codec synthesises words in the voices of the domain with espeak-ng, and knows again what it has synthesised; the
engine reads the words of a prompt and answers with them. So what the family "speech" makes of a right model can be
tested with real audio, and what it makes of a wrong one by a single planted fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.audio import AudioSource, Waveform, load_audio
from gpa_codecs.codec import AudioTokens, Codes, Family, Voice
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.checkpoint.speech_domain import SpeechDomain
from gpa_engines.checkpoint.speech_domain_writing import Speak
from gpa_engines.engine import EngineInfo, GenerationRequest, GenerationUsage, TokenDelta
from gpa_engines.lm_config import LMConfig

VOICE_STEP = 100
"""Between the global codes of successive voices."""


class WordCodec:
    """A SpeechCodec of one semantic code per word. speak: says words in a voice of the domain.

    foreign_voice: decode in the next voice, as an engine does that loses the speaker.
    """

    sample_rate = 16000
    semantic_cardinality = 64
    glm_cardinality = 64

    def __init__(self, domain: SpeechDomain, speak: Speak, *, foreign_voice: bool = False) -> None:
        self._domain = domain
        self._speak = speak
        self._foreign = foreign_voice
        self._words = {
            self._key(load_audio(domain.clip_file(each.clip))): each.text.split() for each in domain.utterances
        }
        self._voices = {self._key(load_audio(domain.clip_file(voice.clip))): n for n, voice in enumerate(domain.voices)}

    def encode(self, audio: AudioSource, families: Collection[Family] = ("semantic", "glm")) -> AudioTokens:
        waveform = load_audio(audio)
        codes = np.array([self._domain.words.index(word) for word in self._words[self._key(waveform)]], np.int64)
        return AudioTokens(codes, codes, waveform.duration)

    def voice(self, audio: AudioSource) -> Voice:
        return Voice((self._voices[self._key(load_audio(audio))] * VOICE_STEP,) * 32)

    def decode(self, semantic: Codes, voice: Voice) -> Waveform:
        number = voice.codes[0] // VOICE_STEP + self._foreign
        speaker = self._domain.voices[number % len(self._domain.voices)]
        words = [self._domain.words[code] for code in semantic]
        pcm = np.concatenate([self._speak(text, speaker.name) for text in _breaths(words)])
        waveform = Waveform(pcm - pcm.mean())
        self._words[self._key(waveform)] = words
        return Waveform(pcm)

    @staticmethod
    def _key(waveform: Waveform) -> bytes:
        return np.round(np.asarray(waveform.pcm, np.float64) * 4096).astype(np.int16).tobytes()


def _breaths(words: Sequence[str]) -> list[str]:
    """Six words at a time: an engine that runs on says hundreds."""
    return [" ".join(words[start : start + 6]) for start in range(0, len(words), 6)]


class WordEngine:
    """Answers with the words of the prompt, exactly; subclasses change `words` or `say`."""

    def __init__(self, model_dir: Path, dtype: str = "float32") -> None:
        self.space = TokenSpace.from_file(model_dir / "tokenizer.json")
        self.domain = SpeechDomain.open(model_dir)
        self.active = 0
        self.answered = 0
        size = LMConfig.from_file(model_dir / "config.json").vocab_size
        capabilities = frozenset(("allowed", "batch", "seed"))
        self.info = EngineInfo("words", "cpu", dtype, size, 4096, capabilities)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        self.active += 1
        await asyncio.sleep(0)  # let the others come in
        try:
            task, words = self.read(request.prompt_ids)
            words = self.change(task, words, request)
            self.answered += 1
            ids = self.say(task, words)[: request.sampling.max_new_tokens]
            reason = "length" if len(ids) == request.sampling.max_new_tokens else "stop"
            yield TokenDelta(tuple(ids))
            usage = GenerationUsage(len(request.prompt_ids), len(ids), request.sampling.seed or 0, 0.0, 0.0, 0.0)
            yield TokenDelta((), reason, usage)
        finally:
            self.active -= 1

    def read(self, ids: Sequence[int]) -> tuple[str, list[str]]:
        """Task and words of a prompt."""
        space = self.space
        semantic = [token - space.semantic.offset for token in ids if token in space.semantic.range]
        if ids[0] == space.control.start_glm:
            return "stt", [self.domain.words[code] for code in semantic]
        if semantic:
            return "vc", [self.domain.words[code] for code in semantic]
        start, end = ids.index(space.control.start_content), ids.index(space.control.end_content)
        return "tts-a", list(self.domain.words_of(space.decode_text(ids[start + 1 : end])))

    def change(self, task: str, words: list[str], request: GenerationRequest) -> list[str]:
        """What the engine says instead of the right words."""
        return words

    def say(self, task: str, words: list[str]) -> list[int]:
        """Ids of an answer."""
        if task == "stt":
            return self.space.encode_text(" ".join(words))
        return self.space.semantic.ids([self.domain.words.index(word) for word in words])

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        raise AssertionError("it says that it has none")

    async def close(self) -> None:
        """There is nothing to close."""


class Misreader(WordEngine):
    """Transcribes the first word as the next digit, and speaks rightly."""

    def change(self, task: str, words: list[str], request: GenerationRequest) -> list[str]:
        return self.shifted(words) if task == "stt" else words

    def shifted(self, words: list[str]) -> list[str]:
        known = self.domain.words
        return [known[(known.index(words[0]) + 1) % len(known)], *words[1:]]


class Misspeaker(Misreader):
    """Speaks the first word as the next digit, and transcribes rightly."""

    def change(self, task: str, words: list[str], request: GenerationRequest) -> list[str]:
        return words if task == "stt" else self.shifted(words)


class Unsampled(Misreader):
    """Is right until it samples."""

    def change(self, task: str, words: list[str], request: GenerationRequest) -> list[str]:
        return self.shifted(words) if request.sampling.temperature else words


class Distracted(WordEngine):
    """Forgets the last word when it is not alone."""

    def change(self, task: str, words: list[str], request: GenerationRequest) -> list[str]:
        return words[:-1] if self.active > 1 else words


class Silent(WordEngine):
    """Ends every answer of speech at once."""

    def change(self, task: str, words: list[str], request: GenerationRequest) -> list[str]:
        return words if task == "stt" else []


class Stutterer(WordEngine):
    """Says everything twice."""

    def change(self, task: str, words: list[str], request: GenerationRequest) -> list[str]:
        return words if task == "stt" else words * 2


class Stumbler(WordEngine):
    """Breaks once, while it listens to the recordings, and is right before and after."""

    def change(self, task: str, words: list[str], request: GenerationRequest) -> list[str]:
        if self.answered == 25:
            self.answered += 1
            raise RuntimeError("stumbled")
        return words


class Foreigner(WordEngine):
    """Cannot restrict its answers, and speaks in text."""

    def __init__(self, model_dir: Path, dtype: str = "float32") -> None:
        super().__init__(model_dir, dtype)
        self.info = replace(self.info, capabilities=self.info.capabilities - {"allowed"})

    def say(self, task: str, words: list[str]) -> list[int]:
        return self.space.encode_text(" ".join(words)) if words else []
