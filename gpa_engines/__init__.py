"""GPA, one speech model on every inference engine.

>>> from gpa_engines import SpeechModel
>>> with SpeechModel.load("path/to/checkpoint") as model:
...     print(model.transcribe("clip.wav").text)

Importing this package loads no framework; a backend's framework is imported when an engine of it is created.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpa_engines.engine import Engine, EngineInfo, GenerationRequest, SamplingParams, TokenDelta
    from gpa_engines.registry import create_engine, list_backends
    from gpa_engines.speech import AsyncSpeechModel, SpeechModel

__version__ = "0.1.0"

_MODULES = {
    "AsyncSpeechModel": "gpa_engines.speech",
    "Engine": "gpa_engines.engine",
    "EngineInfo": "gpa_engines.engine",
    "GenerationRequest": "gpa_engines.engine",
    "SamplingParams": "gpa_engines.engine",
    "SpeechModel": "gpa_engines.speech",
    "TokenDelta": "gpa_engines.engine",
    "create_engine": "gpa_engines.registry",
    "list_backends": "gpa_engines.registry",
}

__all__ = [
    "AsyncSpeechModel",
    "Engine",
    "EngineInfo",
    "GenerationRequest",
    "SamplingParams",
    "SpeechModel",
    "TokenDelta",
    "create_engine",
    "list_backends",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
