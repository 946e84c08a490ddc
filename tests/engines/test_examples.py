"""The clips that ship with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from gpa_codecs.audio import load_audio
from gpa_codecs.errors import AudioError
from gpa_engines.examples import example_clip


@pytest.mark.parametrize(
    ("name", "original"), [("example:voice", "en_female_16k.wav"), ("example:speech", "en_male_16k.wav")]
)
def test_an_example_clip_is_the_recorded_clip(name: str, original: str, audio_dir: Path) -> None:
    path = example_clip(name)
    assert np.array_equal(load_audio(path).pcm, load_audio(audio_dir / original).pcm)
    assert soundfile.info(path).subtype == "PCM_16"
    assert path.stat().st_size < 110_000


def test_their_origin_is_stated() -> None:
    assert "no human voice" in (example_clip("example:voice").parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["example:song", "voice", ""])
def test_another_name_lists_the_clips(name: str) -> None:
    with pytest.raises(AudioError, match="choose one of: example:voice, example:speech"):
        example_clip(name)
