"""What the cases of the family "speech" share: held-out utterances, their prompts, and what is heard of audio.

Nothing is loaded, encoded or recognised before it is needed, and then once. All calls block, and are for one thread at
a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.audio import SAMPLE_RATE, Waveform, load_audio, remove_dc
from gpa_codecs.codec import MINIMUM_LENGTH, AudioTokens, SpeechCodec, Voice
from gpa_codecs.errors import TokenError
from gpa_codecs.prompts import Task, stt_prompt, task_tokens, tts_prompt, vc_prompt
from gpa_codecs.vocabulary import TokenSpace
from gpa_conformance.prompts import Prompt
from gpa_conformance.speech.pitch import median_f0
from gpa_conformance.speech.recogniser import Recogniser, find_recogniser
from gpa_engines.checkpoint.speech_domain import DomainVoice, SpeechDomain, Utterance
from gpa_engines.engine import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from gpa_conformance.families.answers import Answer

UTTERANCES = 24
"""Of trained voices, that a run takes unless it is told another number."""

NO_DOMAIN = "the checkpoint has no speech_domain.json: nothing says what it can speak"


@dataclass(frozen=True, slots=True, eq=False)
class Spoken:
    """Audio and what is in it. f0: median pitch in Hz, 0 without any. heard: by the independent recogniser, if any."""

    pcm: NDArray[np.float32]
    f0: float
    heard: tuple[str, ...] | None

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.pcm) / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class Item:
    """An utterance of the run. words: what it says. source: who says it. target: whose voice "vc" gives it."""

    utterance: Utterance
    words: tuple[str, ...]
    source: DomainVoice
    target: DomainVoice

    @property
    def trained(self) -> bool:
        """Whether the checkpoint knows the voice: the others are measured, and have no limit."""
        return self.source.trained

    def voice(self, task: Task) -> DomainVoice:
        """The voice that the answer to a task is to have."""
        return self.target if task == "vc" else self.source


class SpeechMaterial:
    """Utterances of a domain, with a codec.

    get_codec: called whenever the codec is needed; the caller decides how long it lives. recognise: False leaves the
    independent recogniser out. answers, transcripts: what the engine under test has given, by case and concurrency, and
    by what it has heard; whoever asks it fills them.
    """

    def __init__(
        self,
        domain: SpeechDomain,
        utterances: int,
        space: TokenSpace,
        get_codec: Callable[[], SpeechCodec],
        *,
        recognise: bool = True,
    ) -> None:
        self.domain = domain
        self.space = space
        self.items = choose(domain, utterances)
        self.answers: dict[tuple[str, int], list[Answer]] = {}
        self.transcripts: dict[Spoken, tuple[str, ...]] = {}
        self._codec = get_codec
        self._recognise = recognise
        self._codes: dict[str, AudioTokens] = {}
        self._voices: dict[str, Voice] = {}
        self._natural: dict[str, Spoken] = {}
        self._spoken: dict[tuple[str, tuple[int, ...]], Spoken | None] = {}

    @cached_property
    def recogniser(self) -> tuple[Recogniser | None, str]:
        """The independent recogniser, or None and why there is none."""
        if not self._recognise:
            return None, "no independent recogniser was asked for"
        return find_recogniser(self.domain.words, self.domain.language)

    def prompts(self, task: Task) -> list[Prompt]:
        """The prompt of every item. stt: its clip. tts-a: its text in its own voice. vc: its clip in another's."""
        return [self._prompt(task, item) for item in self.items]

    def requests(self, task: Task, sampling: Mapping[str, Any]) -> list[GenerationRequest]:
        """What is asked of every item. sampling: fields of SamplingParams; the length is chosen here."""
        return [
            GenerationRequest(
                prompt.ids, SamplingParams(max_new_tokens=length, **sampling), prompt.stop_ids, prompt.allowed
            )
            for prompt, length in zip(self.prompts(task), self.new_tokens(task), strict=True)
        ]

    def new_tokens(self, task: Task) -> list[int]:
        """Ids that the answer to each item may have: about twice what a right one has."""
        if task == "stt":
            longest = max(len(self.space.encode_text(item.utterance.text)) for item in self.items)
            return [2 * longest + 16] * len(self.items)
        return [2 * len(self.codes(item).semantic) + 50 for item in self.items]

    def transcribe_prompt(self, pcm: NDArray[np.floating]) -> Prompt | None:
        """What asks for the text of floating[N]; None where it is too short to ask."""
        if len(pcm) < MINIMUM_LENGTH or not np.isfinite(pcm).all():
            return None
        return self._task_prompt("stt", stt_prompt(self.space, self._codec().encode(Waveform(pcm))))

    def codes(self, item: Item) -> AudioTokens:
        """Of an item's clip."""
        name = item.utterance.clip.path
        if name not in self._codes:
            self._codes[name] = self._codec().encode(self.domain.clip_file(item.utterance.clip))
        return self._codes[name]

    def natural(self, item: Item) -> Spoken:
        """The item's clip itself."""
        name = item.utterance.clip.path
        if name not in self._natural:
            self._natural[name] = self._examine(load_audio(self.domain.clip_file(item.utterance.clip)).pcm)
        return self._natural[name]

    def speak(self, ids: Sequence[int], voice: DomainVoice) -> Spoken | None:
        """An answer of semantic ids as audio in a voice; None where it is empty or holds other ids."""
        key = (voice.name, tuple(ids))
        if key not in self._spoken:
            try:
                codes = self.space.semantic.codes(ids)
            except TokenError:
                codes = np.empty(0, np.int64)
            audio = remove_dc(self._codec().decode(codes, self._voice(voice)).pcm) if len(codes) else None
            self._spoken[key] = None if audio is None else self._examine(audio)
        return self._spoken[key]

    def words(self, ids: Sequence[int]) -> tuple[str, ...]:
        """An answer of text ids as words; none where it holds other ids."""
        try:
            return self.domain.words_of(self.space.decode_text(ids))
        except TokenError:
            return ()

    def _prompt(self, task: Task, item: Item) -> Prompt:
        match task:
            case "stt":
                ids = stt_prompt(self.space, self.codes(item))
            case "tts-a":
                ids = tts_prompt(self.space, item.utterance.text, self._voice(item.voice(task)))
            case "vc":
                ids = vc_prompt(self.space, self.codes(item).semantic, self._voice(item.voice(task)))
        return self._task_prompt(task, ids)

    def _task_prompt(self, task: Task, ids: Sequence[int]) -> Prompt:
        stop_ids, allowed = task_tokens(self.space, task)
        return Prompt(tuple(ids), stop_ids, allowed, task)

    def _voice(self, voice: DomainVoice) -> Voice:
        if voice.name not in self._voices:
            self._voices[voice.name] = self._codec().voice(self.domain.clip_file(voice.clip))
        return self._voices[voice.name]

    def _examine(self, pcm: NDArray[np.floating]) -> Spoken:
        recogniser, _ = self.recogniser
        heard = recogniser.hear(pcm) if recogniser is not None else None
        return Spoken(np.asarray(pcm, np.float32), median_f0(pcm), heard)


def choose(domain: SpeechDomain, count: int) -> tuple[Item, ...]:
    """`count` utterances of trained voices, and of the others as many for each voice; fewer where there are no more.

    The voices come in turn, each with its utterances in the order of the document: a smaller number is the start of a
    larger. Every utterance goes to another trained voice in "vc", if there is one.
    """
    trained = [voice for voice in domain.voices if voice.trained]
    by_voice: defaultdict[str, list[Item]] = defaultdict(list)
    for number, utterance in enumerate(domain.utterances):
        source = domain.voice(utterance.voice)
        others = [voice for voice in trained if voice != source] or [source]
        item = Item(
            utterance, tuple(utterance.text.split()), source, others[number // len(domain.voices) % len(others)]
        )
        by_voice[utterance.voice].append(item)
    known = _in_turn([by_voice[voice.name] for voice in trained])[:count]
    each = -(-len(known) // len(trained)) if trained else 0
    return (*known, *_in_turn([by_voice[voice.name][:each] for voice in domain.voices if not voice.trained]))


def _in_turn(lists: Sequence[Sequence[Item]]) -> list[Item]:
    """The first of each, the second of each, and so on."""
    longest = max(map(len, lists), default=0)
    return [each[index] for index in range(longest) for each in lists if index < len(each)]
