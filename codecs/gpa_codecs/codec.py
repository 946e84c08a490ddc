"""The speech codec contract: audio to token codes and back, independent of any framework."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.audio import AudioSource, Waveform
from gpa_codecs.errors import TokenError
from gpa_codecs.files import write_atomically

SEMANTIC_RATE = 50
"""BiCodec semantic codes per second of audio."""

HOP_LENGTH = 320
"""Samples of 16 kHz audio per semantic code."""

GLM_RATE = 12.5
"""GLM-4-Voice codes per second of audio."""

MINIMUM_LENGTH = 400
"""Samples at 16 kHz of the shortest clip: the receptive field of wav2vec 2.0."""

VOICE_LENGTH = 32
"""BiCodec global codes that make a voice."""

VOICE_CARDINALITY = 4096
"""Values that one global code can take: FSQ with six levels of four (Mentzer et al. 2023)."""

Family = Literal["semantic", "glm"]
Codes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AudioTokens:
    """The codes of one clip.

    semantic: int64[T], BiCodec semantic codes, 50 per second; empty when not asked for.
    glm: int64[N], GLM-4-Voice codes, 12.5 per second; empty when not asked for.
    duration: seconds of the clip that the codes stand for.
    """

    semantic: Codes
    glm: Codes
    duration: float


@dataclass(frozen=True, slots=True)
class Voice:
    """A speaker's identity: 32 BiCodec global codes, each in [0, 4096).

    origin: where the voice came from (a file name, a note); metadata only, equality ignores it.
    """

    codes: tuple[int, ...]
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        codes = tuple(int(code) for code in self.codes)
        if len(codes) != VOICE_LENGTH:
            raise TokenError(f"a voice has {VOICE_LENGTH} global codes, but {len(codes)} were given")
        for position, code in enumerate(codes):
            if not 0 <= code < VOICE_CARDINALITY:
                raise TokenError(f"voice code {position} is {code}; expected 0 to {VOICE_CARDINALITY - 1}")
        object.__setattr__(self, "codes", codes)

    def save(self, path: str | Path) -> None:
        """Write the voice as a small JSON file; an existing file is replaced only once the new one is whole."""
        document = {"format": "gpa-voice", "version": 1, "origin": self.origin, "global_codes": list(self.codes)}
        write_atomically(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Voice:
        """Read a voice that :meth:`save` wrote; raises TokenError naming what is wrong with the file."""
        path = Path(path)
        advice = "make one with: gpa-run --ref-audio CLIP --save-voice FILE"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TokenError(f"voice file {path}: {error.strerror or error}; {advice}") from error
        except ValueError as error:
            raise TokenError(f"voice file {path} is not JSON ({error}); {advice}") from error
        if not isinstance(document, dict) or document.get("format") != "gpa-voice":
            raise TokenError(f"voice file {path} has no 'format': 'gpa-voice'; {advice}")
        if document.get("version") != 1:
            raise TokenError(f"voice file {path} has version {document.get('version')!r}; this program reads version 1")
        codes = document.get("global_codes")
        if not isinstance(codes, list) or not all(type(code) is int for code in codes):
            raise TokenError(f"voice file {path}: 'global_codes' must be a list of {VOICE_LENGTH} integers")
        try:
            return cls(tuple(codes), str(document.get("origin", "")))
        except TokenError as error:
            raise TokenError(f"voice file {path}: {error}") from error


@runtime_checkable
class SpeechCodec(Protocol):
    """Audio to codes and back. Implementations load only what the calls they get need.

    sample_rate: Hz of every waveform that goes in (after loading) and comes out; 16000.
    semantic_cardinality, glm_cardinality: codebook sizes.
    """

    @property
    def sample_rate(self) -> int: ...

    @property
    def semantic_cardinality(self) -> int: ...

    @property
    def glm_cardinality(self) -> int: ...

    def encode(self, audio: AudioSource, families: Collection[Family] = ("semantic", "glm")) -> AudioTokens:
        """Codes of a clip. Raises AudioError for audio shorter than 400 samples, or longer than 30 s with "glm"."""
        ...

    def voice(self, audio: AudioSource) -> Voice:
        """The voice of a reference clip: its first 6 s, repeated when shorter."""
        ...

    def decode(self, semantic: Codes, voice: Voice) -> Waveform:
        """Audio of semantic codes int64[T] in a voice: float32[320 * T], as the decoder gives it (no DC removal)."""
        ...
