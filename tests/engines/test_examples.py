"""The clips that ship with the package."""

from __future__ import annotations

import pytest
import soundfile

from gpa_codecs.audio import load_audio
from gpa_codecs.errors import AudioError
from gpa_engines.examples import example_clip


@pytest.mark.parametrize("name", ["example:voice", "example:speech"])
def test_an_example_clip_is_a_short_recording(name: str) -> None:
    path = example_clip(name)
    assert 1.5 < load_audio(path).duration < 2
    assert soundfile.info(path).subtype == "PCM_16"


def test_their_origin_is_stated() -> None:
    text = (example_clip("example:voice").parent / "README.md").read_text(encoding="utf-8")
    assert "no human voice" in " ".join(text.split())


@pytest.mark.parametrize("name", ["example:song", "voice", ""])
def test_another_name_lists_the_clips(name: str) -> None:
    with pytest.raises(AudioError, match="choose one of: example:voice, example:speech"):
        example_clip(name)
