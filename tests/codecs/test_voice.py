"""A voice is 32 codes that survive a file, and a file that is not a voice is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpa_codecs.codec import Voice
from gpa_codecs.errors import TokenError

CODES = tuple(range(0, 4096, 128))


def test_a_voice_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "anna.json"
    Voice(CODES, origin="Anna, 2026 – 嗨").save(path)
    voice = Voice.load(path)
    assert voice == Voice(CODES)
    assert voice.origin == "Anna, 2026 – 嗨"
    assert [file.name for file in tmp_path.iterdir()] == ["anna.json"]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (CODES[:-1], "32 global codes, but 31"),
        ((*CODES[:-1], 4096), "voice code 31 is 4096; expected 0 to 4095"),
        ((-1, *CODES[1:]), "voice code 0 is -1"),
    ],
)
def test_wrong_codes_are_named(codes: tuple[int, ...], message: str) -> None:
    with pytest.raises(TokenError, match=message):
        Voice(codes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("RIFF", "is not JSON"),
        ("[1, 2]", "no 'format': 'gpa-voice'"),
        (json.dumps({"format": "gpa-voice", "version": 2, "global_codes": CODES}), "version 2; this program reads"),
        (json.dumps({"format": "gpa-voice", "version": 1}), "'global_codes' must be a list"),
        (json.dumps({"format": "gpa-voice", "version": 1, "global_codes": [1.5] * 32}), "'global_codes' must be"),
        (json.dumps({"format": "gpa-voice", "version": 1, "global_codes": [5000] * 32}), "code 0 is 5000"),
    ],
)
def test_a_file_that_is_no_voice_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "voice.json"
    path.write_text(content)
    with pytest.raises(TokenError, match=rf"voice\.json.*{message}"):
        Voice.load(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match=r"none\.json: No such file.*--save-voice"):
        Voice.load(tmp_path / "none.json")
