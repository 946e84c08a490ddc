"""What a small trained checkpoint can hear and speak: the file `speech_domain.json` beside its config.json.

    {"schema": "gpa-speech-domain/1",
     "language": "en",
     "words": ["zero", "one"],                 all that it knows, as a transcription spells them
     "spellings": {"0": "zero"},               other ways of writing them that it reads; may be left out
     "max_words": 6,                           at a time
     "limits": ["It knows no human voice."],   what it does not do, in sentences to show
     "voices": [{"name": "low", "f0": 100.0, "trained": true, "text": "one zero", "clip": "speech_domain/low.ogg",
                 "sha256": "..."}],            median pitch in Hz; a reference clip, and what it says
     "utterances": [{"text": "zero one one", "voice": "low", "clip": "speech_domain/000.ogg", "sha256": "..."}]}

The utterances were never trained on. Clips are audio files of the folder; as their hashes are in the document, its own
hash stands for all of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from gpa_codecs.errors import CheckpointError

FILE_NAME = "speech_domain.json"
SCHEMA = "gpa-speech-domain/1"

RELEASED = "AutoArk-AI/GPA"
"""The checkpoint that speaks any text."""

MOST_TOLD = 6
"""Unknown words that a warning names; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Clip:
    """An audio file of the domain. path: below the checkpoint's folder, with "/". text: what it says."""

    path: str
    sha256: str
    text: str


@dataclass(frozen=True, slots=True)
class DomainVoice:
    """f0: median pitch in Hz. clip: the reference that a voice is read from. trained: False for one never learned."""

    name: str
    f0: float
    trained: bool
    clip: Clip


@dataclass(frozen=True, slots=True)
class Utterance:
    """One held-out recording. voice: name of a DomainVoice."""

    voice: str
    clip: Clip

    @property
    def text(self) -> str:
        """What it says, in words of the domain, separated by spaces."""
        return self.clip.text


@dataclass(frozen=True, slots=True)
class SpeechDomain:
    """A document as the module describes it. folder: of the checkpoint."""

    folder: Path
    language: str
    words: tuple[str, ...]
    max_words: int
    limits: tuple[str, ...]
    voices: tuple[DomainVoice, ...]
    utterances: tuple[Utterance, ...]
    spellings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> SpeechDomain:
        """Read and check the document of a checkpoint; clips are looked at when they are used (`clip_file`).

        Raises CheckpointError naming the key and the value that is wrong.
        """
        file = Path(folder) / FILE_NAME
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from error
        return _Reader(str(file)).domain(Path(folder), document)

    def voice(self, name: str) -> DomainVoice:
        """The voice of that name. Raises KeyError."""
        for voice in self.voices:
            if voice.name == name:
                return voice
        raise KeyError(name)

    def words_of(self, text: str) -> tuple[str, ...]:
        """A text as words, in lower case and without punctuation; what is spelled another way is the word it means."""
        return tuple(self.spellings.get(word, word) for word in _words(text))

    def unknown_words(self, text: str) -> tuple[str, ...]:
        """The distinct words of a text that the checkpoint has never learned, in their order."""
        return tuple(dict.fromkeys(word for word in self.words_of(text) if word not in self.words))

    @property
    def summary(self) -> str:
        """What the checkpoint knows, as the beginning of a sentence."""
        return f"this checkpoint knows only the words {', '.join(self.words)}, {self.max_words} at a time"

    def warning(self, text: str) -> str | None:
        """Why a text will not be spoken rightly, in a sentence; None for a text of the domain."""
        unknown, count = self.unknown_words(text), len(self.words_of(text))
        if not unknown and count <= self.max_words:
            return None
        if unknown:
            told = ", ".join(map(repr, unknown[:MOST_TOLD]))
            rest = f" and {len(unknown) - MOST_TOLD} more" if len(unknown) > MOST_TOLD else ""
            wrong = f"{told}{rest} will not be spoken rightly"
        else:
            wrong = f"a text of {count} may not be spoken rightly"
        return f"{self.summary}: {wrong}; for any text use --model {RELEASED}"

    def clip_file(self, clip: Clip) -> Path:
        """The file of a clip. Raises CheckpointError where it is missing or another than was recorded."""
        path = self.folder / clip.path
        try:
            with path.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}; {FILE_NAME} names it as a clip") from error
        if found != clip.sha256:
            raise CheckpointError(
                f"{path} has sha256 {found}, in {FILE_NAME} {clip.sha256}: it is damaged, or of another checkpoint"
            )
        return path


def find_speech_domain(folder: Path) -> SpeechDomain | None:
    """The domain of the checkpoint in `folder`, None where it says nothing. Raises CheckpointError as `open`."""
    return SpeechDomain.open(folder) if (folder / FILE_NAME).exists() else None


def document_text(domain: SpeechDomain) -> str:
    """The file's content. Raises CheckpointError for a domain that `SpeechDomain.open` would refuse."""
    document = {
        "schema": SCHEMA,
        "language": domain.language,
        "words": list(domain.words),
        "spellings": dict(domain.spellings),
        "max_words": domain.max_words,
        "limits": list(domain.limits),
        "voices": [
            {"name": voice.name, "f0": voice.f0, "trained": voice.trained, **_clip_document(voice.clip)}
            for voice in domain.voices
        ],
        "utterances": [{"voice": each.voice, **_clip_document(each.clip)} for each in domain.utterances],
    }
    _Reader(FILE_NAME).domain(domain.folder, document)
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _words(text: str) -> list[str]:
    """Runs of letters and digits, with the apostrophes inside of them."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def _clip_document(clip: Clip) -> dict[str, str]:
    return {"text": clip.text, "clip": clip.path, "sha256": clip.sha256}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads a document strictly. source: the file, for messages."""

    source: str

    def domain(self, folder: Path, document: Any) -> SpeechDomain:
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            found = document.get("schema") if isinstance(document, dict) else document
            raise CheckpointError(f"{self.source} has schema {found!r}; this program reads {SCHEMA!r}")
        keys = ("schema", "language", "words", "max_words", "limits", "voices", "utterances")
        self.check_keys(document, "the document", keys, ("spellings",))
        words = self.strings(document["words"], "words")
        if not words or len(set(words)) < len(words) or any(_words(word) != [word] for word in words):
            raise self.wrong("words", words, "distinct words in lower case")
        max_words = document["max_words"]
        if type(max_words) is not int or max_words < 1:
            raise self.wrong("max_words", max_words, "a whole number of at least 1")
        spellings = document.get("spellings", {})
        if not isinstance(spellings, dict) or not set(spellings.values()) <= set(words):
            raise self.wrong("spellings", spellings, "words of the domain by how else they are written")
        language = document["language"]
        if not isinstance(language, str) or not language:
            raise self.wrong("language", language, "a language tag such as 'en'")
        voices = tuple(self.voice(entry, index) for index, entry in enumerate(self.entries(document, "voices")))
        if not voices or len({voice.name for voice in voices}) < len(voices):
            raise self.wrong("voices", [voice.name for voice in voices], "at least one voice, with distinct names")
        utterances = tuple(
            self.utterance(entry, index) for index, entry in enumerate(self.entries(document, "utterances"))
        )
        limits = self.strings(document["limits"], "limits")
        domain = SpeechDomain(folder, language, words, max_words, limits, voices, utterances, dict(spellings))
        self.check_contents(domain)
        return domain

    def check_contents(self, domain: SpeechDomain) -> None:
        names = {voice.name for voice in domain.voices}
        for index, utterance in enumerate(domain.utterances):
            if utterance.voice not in names:
                raise self.wrong(f"utterances[{index}].voice", utterance.voice, f"one of {', '.join(sorted(names))}")
        texts = [(f"voices[{index}].text", voice.clip.text) for index, voice in enumerate(domain.voices)]
        texts += [(f"utterances[{index}].text", each.text) for index, each in enumerate(domain.utterances)]
        for where, text in texts:
            words = text.split()
            if not 0 < len(words) <= domain.max_words or not set(words) <= set(domain.words):
                raise self.wrong(where, text, f"1 to {domain.max_words} of its words, separated by spaces")

    def voice(self, entry: Any, index: int) -> DomainVoice:
        where = f"voices[{index}]"
        self.check_keys(entry, where, ("name", "f0", "trained", "text", "clip", "sha256"))
        name, f0, trained = entry["name"], entry["f0"], entry["trained"]
        if not isinstance(name, str) or not name:
            raise self.wrong(f"{where}.name", name, "a name")
        if isinstance(f0, bool) or not isinstance(f0, int | float) or not (math.isfinite(f0) and f0 > 0):
            raise self.wrong(f"{where}.f0", f0, "a pitch in Hz")
        if not isinstance(trained, bool):
            raise self.wrong(f"{where}.trained", trained, "true or false")
        return DomainVoice(name, float(f0), trained, self.clip(entry, where))

    def utterance(self, entry: Any, index: int) -> Utterance:
        where = f"utterances[{index}]"
        self.check_keys(entry, where, ("voice", "text", "clip", "sha256"))
        return Utterance(str(entry["voice"]), self.clip(entry, where))

    def clip(self, entry: Mapping[str, Any], where: str) -> Clip:
        path, sha256, text = entry["clip"], entry["sha256"], entry["text"]
        if not isinstance(path, str) or not _is_inside(path):
            raise self.wrong(f"{where}.clip", path, "a file below the checkpoint's folder, with '/' between its parts")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise self.wrong(f"{where}.sha256", sha256, "64 hexadecimal digits")
        if not isinstance(text, str):
            raise self.wrong(f"{where}.text", text, "words")
        return Clip(path, sha256, text)

    def entries(self, document: Mapping[str, Any], name: str) -> list[Any]:
        if not isinstance(document[name], list):
            raise self.wrong(name, document[name], "a list")
        return document[name]

    def strings(self, value: Any, name: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.wrong(name, value, "a list of texts")
        return tuple(value)

    def check_keys(self, entry: Any, where: str, keys: Sequence[str], optional: Sequence[str] = ()) -> None:
        if not isinstance(entry, dict):
            raise self.wrong(where, entry, f"an object with {', '.join(keys)}")
        if missing := [key for key in keys if key not in entry]:
            raise CheckpointError(f"{self.source}: {where} has no {', '.join(map(repr, missing))}")
        if unknown := sorted(entry.keys() - {*keys, *optional}):
            raise CheckpointError(f"{self.source}: {where} has unknown keys {', '.join(map(repr, unknown))}")

    def wrong(self, name: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {name} is {value!r}; expected {expected}")


def _is_inside(path: str) -> bool:
    """By its spelling alone: a checkpoint may be a folder of links."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and not {"..", "~"} & set(parts) and not set(path) & set("\\:\0")
