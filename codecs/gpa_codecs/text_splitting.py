"""Cutting long text into pieces that the model can speak in one answer, without losing anything."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


def is_speakable(text: str) -> bool:
    """Whether the text holds anything to say: a letter, an ideograph or a digit of any script."""
    return any(character.isalnum() for character in text)


IDEOGRAPH_SECONDS = 0.22
LETTER_SECONDS = 1 / 12
DIGIT_SECONDS = 0.3
SENTENCE_PAUSE_SECONDS = 0.5
CLAUSE_PAUSE_SECONDS = 0.25
SYMBOL_SECONDS = 0.3
"""Unhurried reading, so that an estimate is rather too long than too short.

Mandarin is spoken at 5.2 and English at 6.2 syllables per second (Pellegrino, Coupé and Marsico 2011, a measurement
without pauses). An ideograph is a syllable: 0.19 s, with a reserve 0.22; kana and hangul are counted like ideographs.
English text read aloud runs at about 150 words of 4.7 letters a minute: 12 letters per second. A digit is a word of one
or two syllables, a symbol such as % or = likewise. Pauses are what speakers make at full stops and at commas.
"""


def estimate_speech_seconds(text: str) -> float:
    """About how long the text takes to say, in seconds; leading and trailing punctuation costs nothing."""
    speech, pauses = _costs(text)
    return float(speech.sum() + pauses.sum())


def split_text(text: str, budget_seconds: float) -> list[str]:
    """Pieces of at most about `budget_seconds` of speech, in order; without whitespace they join to the whole text.

    Cut at sentence ends; where a sentence is too long at clause marks and line ends; where a clause is too long at
    spaces, then beside ideographs; and where even a word is too long, between any two characters. Neighbours that are
    short enough are joined again into as few pieces as fit, of similar length. Every piece has something to say if the
    text has; text of whitespace gives no pieces. By `estimate_speech_seconds` a piece exceeds the budget only if it
    holds a single letter or digit.
    """
    if not budget_seconds > 0:
        raise ValueError(f"budget_seconds is {budget_seconds}; expected a positive number")
    speech, pauses = _costs(text)
    ends = np.concatenate([[0.0], np.cumsum(speech + pauses)])
    speakable = np.concatenate([[0], np.cumsum([character.isalnum() for character in text], dtype=np.int64)])
    leading = np.append(pauses[[character.isalnum() for character in text]], 0.0)

    def seconds(start: int, stop: int) -> float:
        """As `estimate_speech_seconds`: the pause before the first word of a piece costs nothing."""
        return max(0.0, float(ends[stop] - ends[start] - leading[speakable[start]]))

    def pieces(start: int, stop: int, levels: Sequence[Callable[[str], Iterator[int]]]) -> Iterator[Span]:
        if seconds(start, stop) <= budget_seconds or not levels:
            yield start, stop
            return
        cuts = (start + cut for cut in levels[0](text[start:stop]))
        whole: list[Span] = []
        for part in _parts(start, stop, cuts, speakable):
            if seconds(*part) <= budget_seconds:
                whole.append(part)
            else:
                yield from _join(whole, seconds, budget_seconds)
                yield from pieces(*part, levels[1:])
                whole = []
        yield from _join(whole, seconds, budget_seconds)

    found = pieces(0, len(text), (_sentence_cuts, _clause_cuts, _space_cuts, _ideograph_cuts, _character_cuts))
    return [piece for start, stop in found if (piece := text[start:stop].strip())]


Span: TypeAlias = tuple[int, int]
_CLOSERS = "\"'”’»)\\]}」』】〉》）］｝"
_SENTENCE_END = re.compile(rf"[.!?…。！？；]+[{_CLOSERS}]*|\n[^\S\n]*\n")
_CLAUSE_END = re.compile(rf"[,;:!?…，、：—]+[{_CLOSERS}]*|\n")
_SPACE = re.compile(r"\s+")
_WORD_BEFORE = re.compile(r"[^\W\d_]+(?:\.[^\W\d_]+)*\Z")

_TITLES = {"dr", "mr", "mrs", "ms", "prof", "st", "gen", "col", "lt", "capt", "sgt", "rev", "hon", "sen", "gov"}
_NEVER_LAST = _TITLES | {"vs", "cf", "approx", "dept", "est", "e.g", "i.e"}
_BEFORE_NUMBERS = {"no", "nos", "fig", "figs", "eq", "vol", "p", "pp", "ch", "sec"}
_SOMETIMES_LAST = {"etc", "inc", "ltd", "co", "corp", "jr", "sr"}
"""English abbreviations; the last kind ends a sentence if a capital follows, like those with inner dots (p.m.)."""


def _sentence_cuts(text: str) -> Iterator[int]:
    for match in _SENTENCE_END.finditer(text):
        if match[0].isspace() or _ends_sentence(text, match):
            yield _after_space(text, match.end())


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    marks, following = match[0], text[match.end() : match.end() + 1]
    if not marks.isascii() and marks[0] != "…":
        return True
    if following and not (following.isspace() or _is_ideograph(following)):
        return False  # 3.14, example.org
    after = text[_after_space(text, match.end()) :][:1]
    if marks != ".":
        return marks[-1] in ".!?…" or not after.islower()  # "Stop!" he said.
    word = _WORD_BEFORE.search(text, max(0, match.start() - 20), match.start())
    if word is None:
        return True
    abbreviation = word[0].lower()
    initials = word[0].isupper() and all(len(letter) == 1 for letter in word[0].split("."))  # J. Smith, U.S. Army
    if abbreviation in _NEVER_LAST or (initials and word[0] != "I"):
        return False
    if abbreviation in _BEFORE_NUMBERS:
        return not after.isdigit()
    if abbreviation in _SOMETIMES_LAST or "." in abbreviation:
        return after.isupper() or _is_ideograph(after)
    return True


def _clause_cuts(text: str) -> Iterator[int]:
    for match in _CLAUSE_END.finditer(text):
        following = text[match.end() : match.end() + 1]
        inside = following and not (following.isspace() or _is_ideograph(following))  # 1,000
        if match[0] == "\n" or not match[0].isascii() or not inside:
            yield _after_space(text, match.end())


def _space_cuts(text: str) -> Iterator[int]:
    return (match.end() for match in _SPACE.finditer(text))


def _ideograph_cuts(text: str) -> Iterator[int]:
    for position in range(1, len(text)):
        if text[position].isalnum() and (_is_ideograph(text[position]) or _is_ideograph(text[position - 1])):
            yield position


def _character_cuts(text: str) -> Iterator[int]:
    return (position for position, character in enumerate(text) if character.isalnum())


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _is_ideograph(character: str) -> bool:
    """Ideographs, kana and hangul syllables, by block."""
    return character.isalpha() and (
        "\u2e80" <= character <= "\u9fff" or "\uac00" <= character <= "\ufaff" or character >= "\U00020000"
    )


def _costs(text: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds per character, two float64[len(text)]: of speech, and of the pause or symbol before the character."""
    speech, pauses = np.zeros(len(text)), np.zeros(len(text))
    gap: float | None = None  # None until something has been said
    for position, character in enumerate(text):
        if character.isalnum():
            speech[position], pauses[position] = _speakable_cost(character), gap or 0.0
            gap = 0.0
        elif gap is not None and not unicodedata.category(character).startswith("M"):
            between_digits = character in ".,:" and _between_digits(text, position)
            gap = max(gap, SYMBOL_SECONDS if between_digits else _gap_cost(character))
    return speech, pauses


def _speakable_cost(character: str) -> float:
    if character.isnumeric() and not _is_ideograph(character):
        return DIGIT_SECONDS
    return IDEOGRAPH_SECONDS if _is_ideograph(character) else LETTER_SECONDS


def _gap_cost(character: str) -> float:
    if character in ".!?…。！？；":
        return SENTENCE_PAUSE_SECONDS
    if character in ",;:，、：—\n":
        return CLAUSE_PAUSE_SECONDS
    return SYMBOL_SECONDS if character in "%&@#*/\\" or unicodedata.category(character) in ("Sc", "Sm") else 0.0


def _between_digits(text: str, position: int) -> bool:
    return text[position - 1 : position].isdigit() and text[position + 1 : position + 2].isdigit()


def _parts(start: int, stop: int, cuts: Iterator[int], speakable: NDArray[np.int64]) -> list[Span]:
    """[start, stop) cut at `cuts`, but never so that a part has nothing to say: that stays with what is before it.

    speakable[n]: how many of the first n characters can be said.
    """
    bounds = [start]
    for cut, following in pairwise([*cuts, stop]):
        if speakable[bounds[-1]] < speakable[cut] < speakable[following]:
            bounds.append(cut)
    return list(pairwise([*bounds, stop]))


def _join(parts: list[Span], seconds: Callable[[int, int], float], budget: float) -> list[Span]:
    """Adjacent parts joined into as few as fit the budget, and among those ways into the most even ones."""

    def joined(limit: float) -> list[Span]:
        result = parts[:1]
        for start, stop in parts[1:]:
            if seconds(result[-1][0], stop) <= limit:
                result[-1] = (result[-1][0], stop)
            else:
                result.append((start, stop))
        return result

    best = joined(budget)
    low, high = 0.0, budget
    for _ in range(12):
        middle = (low + high) / 2
        attempt = joined(middle)
        if len(attempt) == len(best):
            best, high = attempt, middle
        else:
            low = middle
    return best
