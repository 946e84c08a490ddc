"""What the checkpoint can do, measured on strings that it never saw, by the product itself and an independent judge."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import numpy as np
import torch
from numpy.typing import NDArray

from demo_training.corpus import UNSEEN_VOICES, VOICES, Corpus, SpeakerVoice
from demo_training.digits import WORDS, held_out_texts, written_form
from demo_training.export import training_record
from demo_training.model_card import model_card
from demo_training.narration import narrate
from demo_training.recipe import Recipe, Report
from gpa_codecs.audio import SAMPLE_RATE, Waveform
from gpa_codecs.codec import Voice
from gpa_codecs.errors import BackendError, RequestError
from gpa_codecs.files import write_atomically
from gpa_conformance.speech.figures import Hearing
from gpa_conformance.speech.pitch import median_f0
from gpa_conformance.speech.recogniser import find_recogniser
from gpa_conformance.statistics import bootstrap_ratio
from gpa_engines.speech import AsyncSpeechModel, Speech
from gpa_engines.speech.tasks import SamplingOverrides

_TEXTS = 60  # each in four voices: 240 utterances
_NOTHING = 1600  # samples
_TOGETHER = 16  # requests in the engine's batch

GREEDY: SamplingOverrides = {"temperature": 0.0, "repetition_penalty": 1.0}
SAMPLED: SamplingOverrides = {"temperature": 0.2, "repetition_penalty": 1.2}

# Limits of word error rates: absolute, or above that of the natural recordings.
_STT_LIMIT = 0.015
_ABOVE_NATURAL = {"codec": 0.02, "tts-a greedy": 0.025, "tts-a sampled": 0.025, "vc greedy": 0.025, "vc sampled": 0.025}
_F0_LIMIT = 0.1

Float32 = NDArray[np.float32]
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class _Trial:
    """One utterance: what should be heard, and in whose voice. reference, source: indices of recordings."""

    text: str
    voice: SpeakerVoice
    reference: int
    source: int = -1


class _Session:
    """A loaded checkpoint with its held-out recordings, natural and unseen."""

    def __init__(self, recipe: Recipe, report: Report, model: AsyncSpeechModel, total: int) -> None:
        count = max(2, round(_TEXTS * recipe.scale))
        texts = list(itertools.islice(held_out_texts(recipe.rng("gates")), count))
        self.seen, self.unseen = (narrate(texts, voices) for voices in (VOICES, UNSEEN_VOICES))
        self.model = model
        self._judge, missing = find_recogniser(WORDS, "en")
        if self._judge is None:
            raise BackendError(missing)
        self.judge = self._judge.name
        self.found: dict[str, dict[str, Any]] = {}
        self._report, self._total = report, total
        # Every measure over the same strings in the same order, so that two of them can be compared by utterance.
        self.trials = [
            _Trial(
                text,
                voice,
                # Another string in the voice that is asked for, and the string itself in another voice.
                reference=_recording((row + 1) % len(texts), number),
                source=_recording(row, (number + 1 + row % (len(VOICES) - 1)) % len(VOICES)),
            )
            for row, text in enumerate(texts)
            for number, voice in enumerate(VOICES)
        ]
        self.texts = [trial.text for trial in self.trials]

    def add(self, name: str, hearing: Hearing, **facts: Any) -> None:
        """Keep a measure, and report it."""
        rate = hearing.rate
        self.found[name] = {
            "utterances": len(hearing.errors),
            "words": sum(hearing.words),
            "errors": hearing.counts,
            "wer": rate.value,
            "interval": [rate.low, rate.high],
            **facts,
        }
        self._report(len(self.found), self._total, {name: rate.value})

    def heard(self, waves: Sequence[Float32]) -> Hearing:
        """What the judge makes of waves that should say `self.texts`."""
        assert self._judge is not None
        return self._hearing([self._judge.hear(wave) for wave in waves])

    async def transcribed(self, waves: Sequence[Float32]) -> Hearing:
        """What the checkpoint itself makes of them."""
        return self._hearing([text.split() for text in await _each(waves, self._transcribe)])

    def _hearing(self, heard: Sequence[Sequence[str]]) -> Hearing:
        return Hearing.of([text.split() for text in self.texts], heard)

    async def add_speech(self, name: str, waves: Sequence[Float32], voices: Sequence[SpeakerVoice]) -> None:
        """Keep a measure of speech that was made: its words by both ears, pitch, and seconds per word."""
        own = await self.transcribed(waves)
        words = sum(len(text.split()) for text in self.texts)
        self.add(
            name,
            self.heard(waves),
            own_stt_wer=own.rate.value,
            seconds_per_word=sum(len(wave) for wave in waves) / SAMPLE_RATE / words,
            pitch=_pitches(waves, voices),
        )

    async def _transcribe(self, wave: Float32) -> str:
        # A single code is less audio than the codec takes; nothing can be said in it.
        return (await self.model.transcribe(Waveform(wave))).text if len(wave) >= _NOTHING else ""


def listen(recipe: Recipe, report: Report) -> None:
    """Stage `listen`: natural recordings, stt, the codec alone, vc."""
    anyio.run(_with_model, recipe, report, _listen, "gates-listen", 7)


def speak(recipe: Recipe, report: Report) -> None:
    """Stage `speak`: tts-a."""
    anyio.run(_with_model, recipe, report, _speak, "gates-speak", 4)


def conclude(recipe: Recipe, report: Report) -> None:
    """Stage `gates`: hold the measures against their limits, and say in the checkpoint what it can do."""
    measures = {}
    for name in ("gates-listen", "gates-speak"):
        measures |= json.loads(recipe.file(f"{name}.json").read_text(encoding="utf-8"))
    errors = {name: np.array(measure.pop("errors")) for name, measure in measures.items()}
    words = measures["natural"].pop("words_of_utterances")
    for name in _ABOVE_NATURAL:
        # The same utterances in two conditions: their differences are drawn in pairs.
        above = bootstrap_ratio(errors[name] - errors["natural"], words)
        measures[name] |= {"above_natural": above.value, "above_natural_interval": [above.low, above.high]}
    verdicts = _verdicts(measures)
    record_ = training_record(recipe.out)
    gates = {
        "seed": recipe.seed,
        "scale": recipe.scale,
        "commits": list(dict.fromkeys(stage["commit"] for stage in record_["stages"].values())),
        "judge": f"{measures['natural'].pop('judge')} with a grammar of the ten digits",
        "voices": {voice.name: voice.f0 for voice in VOICES},
        "unseen_voices": {voice.name: voice.f0 for voice in UNSEEN_VOICES},
        "reached": all(verdict["reached"] for verdict in verdicts),
        "gates": verdicts,
        "measures": measures,
    }
    place = recipe.out / "checkpoint"
    for name, document in (("training.json", record_), ("gates.json", gates)):
        write_atomically(place / name, (json.dumps(document, indent=2) + "\n").encode())
    write_atomically(place / "README.md", model_card(gates).encode())
    shutil.rmtree(recipe.out / "work", ignore_errors=True)
    report(1, 1, {"reached": float(gates["reached"])})


async def _with_model(
    recipe: Recipe,
    report: Report,
    measure: Callable[[_Session], Awaitable[None]],
    name: str,
    total: int,
) -> None:
    model = await AsyncSpeechModel.load(
        recipe.out / "checkpoint", backend="torch", device="cpu", threads=torch.get_num_threads()
    )
    try:
        session = _Session(recipe, report, model, total)
        await measure(session)
    finally:
        await model.close()
    write_atomically(recipe.file(f"{name}.json"), (json.dumps(session.found, indent=2) + "\n").encode())


async def _listen(session: _Session) -> None:
    codec, seen, unseen = session.model.codec, session.seen, session.unseen
    natural = [seen.wave(index) for index in range(len(seen))]
    hearing = session.heard(natural)
    pitches = _pitches(natural, _voices(session))
    session.add("natural", hearing, words_of_utterances=hearing.words, judge=session.judge, pitch=pitches)
    session.add("stt", await session.transcribed(natural))
    session.add("stt unseen voices", await session.transcribed([unseen.wave(index) for index in range(len(unseen))]))
    voices = _known_voices(session)
    decoded = [
        codec.decode(codec.encode(Waveform(wave), ["semantic"]).semantic, voices[trial.reference]).pcm
        for wave, trial in zip(natural, session.trials, strict=True)
    ]
    await session.add_speech("codec", decoded, _voices(session))
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        await session.add_speech(f"vc {name}", await _converted(session, seen, voices, sampling), _voices(session))
    converted = await _converted(session, unseen, voices, SAMPLED)
    await session.add_speech("vc unseen sources", converted, _voices(session))


async def _speak(session: _Session) -> None:
    voices = _known_voices(session)
    rng = np.random.default_rng(0)
    written = [written_form(text, rng) for text in session.texts]
    for name, texts, sampling in (
        ("tts-a greedy", session.texts, GREEDY),
        ("tts-a sampled", session.texts, SAMPLED),
        ("tts-a written forms", written, SAMPLED),
    ):
        asked = [(text, voices[trial.reference]) for text, trial in zip(texts, session.trials, strict=True)]
        await session.add_speech(name, await _spoken(session, asked, sampling), _voices(session))
    strangers = [
        session.model.codec.voice(Waveform(session.unseen.wave(index))) for index in range(len(session.unseen))
    ]
    asked = [(trial.text, strangers[trial.reference]) for trial in session.trials]
    unseen = [UNSEEN_VOICES[trial.reference % len(UNSEEN_VOICES)] for trial in session.trials]
    await session.add_speech("tts-a unseen voices", await _spoken(session, asked, SAMPLED), unseen)


async def _spoken(session: _Session, asked: Sequence[tuple[str, Voice]], sampling: SamplingOverrides) -> list[Float32]:
    async def one(item: tuple[int, tuple[str, Voice]]) -> Float32:
        seed, (text, voice) = item
        return await _pcm(session.model.synthesize(text, voice, **{**sampling, "seed": seed}))

    return await _each(list(enumerate(asked)), one)


async def _converted(
    session: _Session, sources: Corpus, voices: Sequence[Voice], sampling: SamplingOverrides
) -> list[Float32]:
    async def one(item: tuple[int, _Trial]) -> Float32:
        seed, trial = item
        source = Waveform(sources.wave(trial.source))
        return await _pcm(session.model.convert(source, voices[trial.reference], **{**sampling, "seed": seed}))

    return await _each(list(enumerate(session.trials)), one)


async def _pcm(speaking: Awaitable[Speech]) -> Float32:
    """What was spoken; where the model had nothing to say, silence, in which nobody hears a word."""
    try:
        return (await speaking).waveform.pcm.astype(np.float32)
    except RequestError:
        return np.zeros(_NOTHING, np.float32)


async def _each(items: Sequence[ItemT], work: Callable[[ItemT], Awaitable[ResultT]]) -> list[ResultT]:
    """The results for all items, several at work at a time."""
    results: dict[int, ResultT] = {}
    limit = anyio.CapacityLimiter(_TOGETHER)

    async def one(index: int, item: ItemT) -> None:
        async with limit:
            results[index] = await work(item)

    async with anyio.create_task_group() as group:
        for index, item in enumerate(items):
            group.start_soon(one, index, item)
    return [results[index] for index in range(len(items))]


def _known_voices(session: _Session) -> list[Voice]:
    """The voice of each recording, as the codec reads it."""
    return [session.model.codec.voice(Waveform(session.seen.wave(index))) for index in range(len(session.seen))]


def _voices(session: _Session) -> list[SpeakerVoice]:
    return [trial.voice for trial in session.trials]


def _recording(row: int, voice: int) -> int:
    return row * len(VOICES) + voice


def _pitches(waves: Sequence[Float32], voices: Sequence[SpeakerVoice]) -> dict[str, dict[str, float]]:
    """By voice: the pitch asked for, the median of the utterances' own, and the share of them within the limit."""
    found = {}
    for voice in dict.fromkeys(voices):
        pitches = np.array([median_f0(wave) for wave, other in zip(waves, voices, strict=True) if other == voice])
        within = np.abs(pitches / voice.f0 - 1) <= _F0_LIMIT
        found[voice.name] = {"asked": voice.f0, "median": float(np.median(pitches)), "within": float(within.mean())}
    return found


def _verdicts(measures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    stt = measures["stt"]
    verdicts = [_verdict("word error rate of stt", stt["wer"], _STT_LIMIT)]
    for name, limit in _ABOVE_NATURAL.items():
        verdicts.append(_verdict(f"word error rate of {name} above natural", measures[name]["above_natural"], limit))
    for name in _ABOVE_NATURAL:
        if name != "codec":
            off = max(abs(pitch["median"] / pitch["asked"] - 1) for pitch in measures[name]["pitch"].values())
            verdicts.append(_verdict(f"median pitch of {name} off the voice's, at worst", off, _F0_LIMIT))
    return verdicts


def _verdict(gate: str, found: float, limit: float) -> dict[str, Any]:
    return {
        "gate": gate,
        "found": f"{found:.1%}",
        "limit": f"{limit:.1%}",
        "reached": bool(found <= limit),
    }
