"""Writing a speech domain into a checkpoint: clips as Ogg Opus, then the document that names them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from gpa_codecs.audio import SAMPLE_RATE
from gpa_codecs.errors import CheckpointError
from gpa_codecs.files import write_atomically
from gpa_engines.checkpoint.speech_domain import FILE_NAME, Clip, DomainVoice, SpeechDomain, Utterance, document_text

CLIPS = "speech_domain"
"""The folder of the clips, in the checkpoint's."""

Speak = Callable[[str, str], NDArray[np.floating]]
"""speak(text, voice) -> float[N] at 16000 Hz, full scale 1."""


@dataclass(frozen=True, slots=True)
class VoicePlan:
    """A voice that is to be written. text: what its reference clip says."""

    name: str
    f0: float
    trained: bool
    text: str


def write_speech_domain(
    folder: str | Path,
    speak: Speak,
    *,
    language: str,
    words: Sequence[str],
    max_words: int,
    limits: Sequence[str],
    voices: Sequence[VoicePlan],
    utterances: Sequence[tuple[str, str]],
    spellings: Mapping[str, str] | None = None,
) -> SpeechDomain:
    """Record a reference clip per voice and a clip per (text, voice), and write the document last.

    The same samples give the same bytes. A domain that was there is replaced; what a failure leaves of the clips is
    not named by any document. Raises CheckpointError for what a reader would refuse, and where it cannot be written.
    """
    folder = Path(folder)
    try:
        (folder / CLIPS).mkdir(parents=True, exist_ok=True)
        domain = SpeechDomain(
            folder,
            language,
            tuple(words),
            max_words,
            tuple(limits),
            tuple(
                DomainVoice(
                    each.name, each.f0, each.trained, _record(folder, f"voice-{number}", each.text, each.name, speak)
                )
                for number, each in enumerate(voices)
            ),
            tuple(
                Utterance(voice, _record(folder, f"{number:04}", text, voice, speak))
                for number, (text, voice) in enumerate(utterances)
            ),
            dict(spellings or {}),
        )
        text = document_text(domain)
        write_atomically(folder / FILE_NAME, text.encode())
    except OSError as error:
        raise CheckpointError(f"{folder / FILE_NAME}: cannot be written: {error.strerror or error}") from error
    return domain


def _record(folder: Path, name: str, text: str, voice: str, speak: Speak) -> Clip:
    content = ogg_opus(speak(text, voice))
    path = f"{CLIPS}/{name}.ogg"
    write_atomically(folder / path, content)
    return Clip(path, hashlib.sha256(content).hexdigest(), text)


def ogg_opus(pcm: NDArray[np.floating]) -> bytes:
    """float[N] at 16000 Hz as a file of Ogg Opus, the same bytes for the same samples."""
    file = io.BytesIO()
    soundfile.write(file, np.asarray(pcm, np.float32), SAMPLE_RATE, format="OGG", subtype="OPUS")
    return _with_serial(file.getvalue(), 1)


_HEADER = 27
"""Bytes of an Ogg page before its segment table (RFC 3533): 14 to 17 are the stream's serial number, 22 to 25 the
checksum, 26 the number of segments."""


def _with_serial(ogg: bytes, serial: int) -> bytes:
    """Give a file's only stream another serial number: libsndfile draws one by the clock."""
    pages, content, start = bytearray(), memoryview(ogg), 0
    while start < len(ogg):
        segments = ogg[start + 26]
        end = start + _HEADER + segments + sum(ogg[start + _HEADER : start + _HEADER + segments])
        page = bytearray(content[start:end])
        page[14:18] = serial.to_bytes(4, "little")
        page[22:26] = bytes(4)
        page[22:26] = _checksum(page).to_bytes(4, "little")
        pages += page
        start = end
    return bytes(pages)


def _checksum(page: bytes | bytearray) -> int:
    """CRC-32 of an Ogg page: polynomial 0x04c11db7, unreflected, starting from 0."""
    value = 0
    for byte in page:
        value = (value << 8 & 0xFFFFFFFF) ^ _TABLE[value >> 24 ^ byte]
    return value


def _table() -> list[int]:
    entries = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 & 0xFFFFFFFF) ^ (0x04C11DB7 if value >> 31 else 0)
        entries.append(value)
    return entries


_TABLE = _table()
