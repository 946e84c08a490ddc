"""The clips that ship with the package: `example:voice` and `example:speech` work wherever a file name does."""

from __future__ import annotations

from pathlib import Path

from gpa_codecs.errors import AudioError

_ASSETS = Path(__file__).parent / "assets"
_CLIPS = {
    "example:voice": "voice.flac",  # 1.7 s, a reference voice: zero nine one eight two seven
    "example:speech": "speech.flac",  # 1.7 s, another voice: three one four one five nine
}


def example_clip(name: str) -> Path:
    """The file of an example clip. Raises AudioError naming the clips that there are."""
    if name not in _CLIPS:
        raise AudioError(f"there is no example clip {name!r}; choose one of: {', '.join(_CLIPS)}")
    return _ASSETS / _CLIPS[name]
