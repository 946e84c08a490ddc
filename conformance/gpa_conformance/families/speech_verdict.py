"""How the family "speech" judges: figures with intervals, held against limits, and told in tables.

A figure fails its limit when all of its 95 % interval lies beyond it. Voices that the checkpoint was not trained on are
measured and told by voice, and have no limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpa_codecs.prompts import Task
from gpa_conformance.cases import Case
from gpa_conformance.context import Context
from gpa_conformance.families.answers import Answer
from gpa_conformance.families.findings import Findings
from gpa_conformance.speech.figures import Hearing, row
from gpa_conformance.speech.material import SpeechMaterial, Spoken
from gpa_conformance.statistics import Interval, bootstrap_ratio, share
from gpa_engines.speech.call import shorten

Words = tuple[str, ...]

MOST_WRONG = 20
"""Wrong utterances that a report lists."""

GATES = ("stt_wer_low", "recogniser_wer_excess_low", "own_wer_excess_low")
"""Word errors that have a limit whatever the baseline says."""

NEAR = 0.10
"""How far the pitch of an utterance may be from its voice's."""


class Verdict:
    """Gathers the figures of one case; `close` writes its tables."""

    def __init__(self, context: Context, case: Case, material: SpeechMaterial, found: Findings) -> None:
        self._context = context
        self._task: Task = case.spec["task"]
        self._material = material
        self._found = found
        self._rows: list[dict[str, Any]] = []
        self._like_baseline = False
        self._trained = [item.trained for item in material.items]
        self._expected = [item.words for item in material.items]

    def transcribed(self, texts: Sequence[Words], recogniser: Sequence[Words] | None) -> None:
        """The engine's transcriptions of the recordings, beside the recogniser's."""
        own = self._hearing(texts)
        theirs = self._hearing(recogniser).rate if recogniser is not None else None
        self._rows.append(row("words wrong", "share", own.rate, _words(own), theirs, "words wrong"))
        self._rows.append(_right(own))
        self._found.metrics["wer"] = own.rate.value
        self._check_low("stt_wer_low", own.rate)

    def understood(self, listener: str, texts: Sequence[Words], natural: Sequence[Words]) -> None:
        """What "recogniser" or "itself" hears in the speech, and in the recordings of the same words."""
        hearing, reference = self._hearing(texts), self._hearing(natural)
        excess = hearing.beyond(reference)
        name = self._name(listener)
        self._rows.append(
            row(
                f"words wrong, by {name}",
                "share",
                hearing.rate,
                _words(hearing),
                reference.rate,
                f"words wrong, {listener}",
            )
        )
        self._rows.append(row("beyond the recordings", "share", excess, _words(hearing)))
        metric = "recogniser" if listener == "recogniser" else "own"
        self._found.metrics |= {f"{metric}_wer": hearing.rate.value, f"{metric}_wer_natural": reference.rate.value}
        self._check_low(f"{metric}_wer_excess_low", excess)

    def right(self, texts: Sequence[Words]) -> None:
        """Utterances without an error."""
        self._rows.append(_right(self._hearing(texts)))

    def pitched(self, spoken: Sequence[Spoken | None], natural: Sequence[Spoken]) -> None:
        """The share of utterances whose median pitch is near the voice's."""
        near = self._part([self._near(number, each) for number, each in enumerate(spoken)])
        source = [abs(each.f0 / item.source.f0 - 1) <= NEAR for each, item in zip(natural, self._items, strict=True)]
        found, reference = share(sum(near), len(near)), share(sum(self._part(source)), len(near))
        self._rows.append(
            row(f"pitch within {100 * NEAR:g} % of the voice", "share", found, _utterances(near), reference, "pitch")
        )
        self._found.metrics["f0_share"] = found.value
        limit = self._context.all_limits.speech["f0_share_high"]
        self._found.check("f0_share_high", found.high, ">=", limit.value, f"speech: {limit.source}")
        if silent := sum(each is None for each in spoken):
            self._found.complain(f"{silent} of {len(spoken)} answers hold no speech")

    def paced(self, spoken: Sequence[Spoken | None], natural: Sequence[Spoken]) -> None:
        """Seconds per word, and how far they are from the recordings'."""
        words = self._part([len(each) for each in self._expected])
        seconds = self._part([0.0 if each is None else each.duration for each in spoken])
        recorded = self._part([each.duration for each in natural])
        found, reference = bootstrap_ratio(seconds, words), bootstrap_ratio(recorded, words)
        self._rows.append(row("seconds per word", "s", found, f"{sum(words)} words", reference, "s per word"))
        limit = self._context.all_limits.speech["duration_off"]
        off = abs(sum(seconds) / sum(recorded) - 1)
        self._found.check("duration_off", off, "<=", limit.value, f"speech: {limit.source}")

    def like_baseline(
        self,
        given: Sequence[Answer],
        recorded: Sequence[tuple[int, ...] | None],
        texts: Sequence[Words],
        theirs: Sequence[Words | None],
    ) -> None:
        """The words against those of the float32 reference's answers to the same prompts, where the baseline has them.

        theirs: what the same listener hears in the recorded answers.
        """
        both = [known and words is not None for known, words in zip(self._trained, theirs, strict=True)]
        if not any(both):
            self._found.note("the baseline has no answers of these utterances to compare with")
            return
        expected, own, other = (
            [words or () for words, wanted in zip(each, both, strict=True) if wanted]
            for each in (self._expected, texts, theirs)
        )
        reference = Hearing.of(expected, other)
        excess = Hearing.of(expected, own).beyond(reference)
        same = [each.ids == ids for each, ids, wanted in zip(given, recorded, both, strict=True) if wanted]
        self._rows.append(
            row("beyond the baseline's answers", "share", excess, _words(reference), None, "beyond baseline")
        )
        self._rows.append(
            row(
                "answers equal to the baseline's",
                "share",
                share(sum(same), len(same)),
                _utterances(same),
                None,
                "equal",
            )
        )
        self._found.metrics |= {"baseline_wer": reference.rate.value, "equal_answers": sum(same) / len(same)}
        room = self._context.limits["wer_room"]
        source = f"{self._context.limits.name}: {room.source}"
        check = self._found.check("baseline_wer_excess_low", _least(excess), "<=", room.value, source)
        self._like_baseline = check.passed

    def close(self, listeners: Mapping[str, Sequence[Words]], spoken: Sequence[Spoken | None] | None = None) -> None:
        """Write the tables. listeners: what each has heard in the engine's answers."""
        recogniser, missing = self._material.recogniser
        if recogniser is None:
            self._found.note(missing)
        self._found.table("speech", self._rows)
        self._found.table("speech_voices", self._voice_rows(listeners, spoken))
        wrong = self._wrong(listeners)
        self._found.table("speech_wrong", wrong[:MOST_WRONG])
        if wrong:
            heard = ", ".join(
                f"{name} {shorten(words)}" for name, words in wrong[0].items() if name not in ("voice", "said")
            )
            self._found.complain(f"{len(wrong)} utterances are not right, first {wrong[0]['said']!r}: {heard}")
        gates = [check for check in self._found.failed if check.metric in GATES]
        if self._like_baseline and gates:
            self._found.complain(
                "the baseline's answers have no fewer wrong words: the checkpoint cannot do it, not the engine"
            )

    @property
    def _items(self) -> Sequence[Any]:
        return self._material.items

    def _name(self, listener: str) -> str:
        recogniser, _ = self._material.recogniser
        return recogniser.name if listener == "recogniser" and recogniser is not None else "the engine itself"

    def _hearing(self, texts: Sequence[Words]) -> Hearing:
        return Hearing.of(self._part(self._expected), self._part(texts))

    def _part(self, values: Sequence[Any]) -> list[Any]:
        """Those of trained voices."""
        return [value for value, trained in zip(values, self._trained, strict=True) if trained]

    def _near(self, number: int, spoken: Spoken | None) -> bool:
        voice = self._material.items[number].voice(self._task)
        return spoken is not None and abs(spoken.f0 / voice.f0 - 1) <= NEAR

    def _check_low(self, metric: str, found: Interval) -> None:
        """The family's limit, with the room of the engine's dtype."""
        limit, room = self._context.all_limits.speech[metric], self._context.limits["wer_room"]
        source = f"speech: {limit.source}; and {100 * room.value:g} points, {self._context.limits.name}: {room.source}"
        self._found.check(metric, _least(found), "<=", limit.value + room.value, source)

    def _voice_rows(
        self, listeners: Mapping[str, Sequence[Words]], spoken: Sequence[Spoken | None] | None
    ) -> list[dict[str, Any]]:
        """A row per voice of the answers."""
        rows = []
        for name in dict.fromkeys(map(self._voice_name, self._material.items)):
            chosen = [n for n, item in enumerate(self._material.items) if self._voice_name(item) == name]
            item = self._material.items[chosen[0]]
            values: dict[str, Any] = {"voice": name, "trained": item.trained, "utterances": len(chosen)}
            for listener, texts in listeners.items():
                hearing = Hearing.of([self._expected[n] for n in chosen], [texts[n] for n in chosen])
                values[f"wrong {listener}".strip()] = hearing.rate.value
            if spoken is not None:
                audio = [each for n in chosen if (each := spoken[n]) is not None]
                values["f0"] = float(np.median([each.f0 for each in audio])) if audio else 0.0
                values["f0_of_voice"] = item.voice(self._task).f0
                values["pitch near"] = sum(self._near(n, spoken[n]) for n in chosen) / len(chosen)
            rows.append(values)
        return rows

    def _voice_name(self, item: Any) -> str:
        name = item.voice(self._task).name
        if item.trained:
            return name
        return f"{name}, from voices not trained on" if self._task == "vc" else f"{name}, not trained on"

    def _wrong(self, listeners: Mapping[str, Sequence[Words]]) -> list[dict[str, Any]]:
        rows = []
        for number, item in enumerate(self._material.items):
            heard = {listener: texts[number] for listener, texts in listeners.items()}
            if item.trained and any(words != item.words for words in heard.values()):
                told = {f"heard by {name}" if name else "heard": " ".join(words) for name, words in heard.items()}
                rows.append({"voice": self._voice_name(item), "said": item.utterance.text, **told})
        return rows


def _least(found: Interval) -> float:
    """The lower end of an excess, 0 where it may be none; NaN stays NaN."""
    return float(np.maximum(0.0, found.low))


def _right(hearing: Hearing) -> dict[str, Any]:
    count = len(hearing.errors)
    return row("utterances all right", "share", share(hearing.right, count), f"{count} utterances")


def _words(hearing: Hearing) -> str:
    return f"{sum(hearing.words)} words"


def _utterances(values: Sequence[Any]) -> str:
    return f"{len(values)} utterances"
