"""The independent recogniser, where it cannot be had; what it hears is tested with the family."""

from __future__ import annotations

import sys

import pytest

from gpa_conformance.speech.recogniser import INSTALL, find_recogniser


@pytest.mark.parametrize(
    ("words", "language", "reason"),
    [
        (("one", "blorg"), "en", "dictionary lacks 'blorg'"),
        (("yi",), "zh", "no independent recogniser of language 'zh'"),
    ],
)
def test_a_recogniser_that_cannot_be_had_is_explained(words: tuple[str, ...], language: str, reason: str) -> None:
    if language == "en":
        pytest.importorskip("pocketsphinx")
    recogniser, found = find_recogniser(words, language)
    assert recogniser is None
    assert reason in found


def test_a_missing_recogniser_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    assert find_recogniser(("one",), "en") == (None, INSTALL)
