"""Speech in and out of any engine: SpeechModel = Engine + SpeechCodec + TokenSpace."""

from gpa_engines.speech.model import AsyncSpeechModel
from gpa_engines.speech.results import (
    AudioPiece,
    PieceReport,
    Progress,
    Speech,
    TextDelta,
    Timings,
    Transcription,
)
from gpa_engines.speech.sync import SpeechModel
from gpa_engines.speech.tasks import SamplingOverrides, task_sampling

__all__ = [
    "AsyncSpeechModel",
    "AudioPiece",
    "PieceReport",
    "Progress",
    "SamplingOverrides",
    "Speech",
    "SpeechModel",
    "TextDelta",
    "Timings",
    "Transcription",
    "task_sampling",
]
