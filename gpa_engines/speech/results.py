"""What the speech tasks give back: text or audio, with everything needed to understand and repeat the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gpa_codecs.audio import Waveform
from gpa_codecs.codec import Codes, Voice
from gpa_engines.engine import FinishReason, GenerationUsage


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. encode: audio to codes. prefill: prompts. first_token: from the call to the first new token of all.
    decode: the tokens after the first. codec: codes to audio. total: the whole call. Pieces that ran side by side are
    added up in prefill, decode and codec, so these can exceed the total."""

    encode: float
    prefill: float
    first_token: float
    decode: float
    codec: float
    total: float


@dataclass(frozen=True, slots=True)
class PieceReport:
    """One model request of a call. source: the text that was spoken, or the part of the clip ("0.00-12.34 s")."""

    source: str
    finish_reason: FinishReason
    usage: GenerationUsage


@dataclass(frozen=True, slots=True)
class Transcription:
    """Text of a clip. duration: seconds of audio. pieces: one per request; more than one where the clip was cut."""

    text: str
    duration: float
    seed: int
    pieces: tuple[PieceReport, ...]
    warnings: tuple[str, ...]
    timings: Timings

    @property
    def prompt_tokens(self) -> int:
        return sum(piece.usage.prompt_tokens for piece in self.pieces)

    @property
    def new_tokens(self) -> int:
        return sum(piece.usage.new_tokens for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Speech:
    """Generated audio. waveform: float32[N] at 16 kHz, mean removed per piece. semantic: int64[T], its codes."""

    waveform: Waveform
    semantic: Codes
    voice: Voice
    seed: int
    pieces: tuple[PieceReport, ...]
    warnings: tuple[str, ...]
    timings: Timings

    @property
    def duration(self) -> float:
        """Seconds of audio."""
        return self.waveform.duration

    @property
    def prompt_tokens(self) -> int:
        return sum(piece.usage.prompt_tokens for piece in self.pieces)

    @property
    def new_tokens(self) -> int:
        return sum(piece.usage.new_tokens for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next part of a transcription; the texts of all deltas, joined, are the whole text."""

    piece: int
    text: str


@dataclass(frozen=True, slots=True)
class AudioPiece:
    """The next part of generated audio; all pieces joined are the whole. waveform: float32[320 * T] at 16 kHz."""

    piece: int
    source: str
    waveform: Waveform
    semantic: Codes


Stage = Literal["encode", "generate", "codec"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a call is. tokens: new tokens so far over all pieces. pieces: how many there are."""

    stage: Stage
    pieces: int = 1
    tokens: int = 0


ProgressCallback = Callable[[Progress], None]
"""Called on the event loop's thread; must return quickly."""
