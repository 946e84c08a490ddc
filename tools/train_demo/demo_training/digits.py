"""The domain: strings of one to six English digit words, which of them are held out, and how they may be written."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

LONGEST = 6
"""Digits in a string."""

# Shorter strings are too few to spare any.
_SHORTEST_HELD_OUT = 3
_HELD_OUT_SHARE = 20
_DRAWS = 10_000


def is_held_out(text: str) -> bool:
    """Whether a string is kept for the gates: one in twenty of those with at least three digits, by its CRC-32."""
    return len(text.split()) >= _SHORTEST_HELD_OUT and zlib.crc32(text.encode()) % _HELD_OUT_SHARE == 0


def training_texts(count: int, rng: np.random.Generator) -> list[str]:
    """`count` distinct strings that are not held out, in random order: all of one and two words, then longer ones.

    rng: decides which strings.
    """
    texts = [" ".join(words) for length in (1, 2) for words in itertools.product(WORDS, repeat=length)]
    distinct = dict.fromkeys(texts)
    while len(distinct) < count:
        text = _random_text(int(rng.integers(_SHORTEST_HELD_OUT, LONGEST + 1)), rng)
        if not is_held_out(text):
            distinct[text] = None
    chosen = list(distinct)[:count]
    rng.shuffle(chosen)
    return chosen


def held_out_texts(rng: np.random.Generator) -> Iterator[str]:
    """Distinct held-out strings of three to six words without an end, the lengths in turn as long as there are any."""
    told: set[str] = set()
    for length in itertools.cycle(range(_SHORTEST_HELD_OUT, LONGEST + 1)):
        # There are some fifty of three words only.
        for _ in range(_DRAWS):
            text = _random_text(length, rng)
            if is_held_out(text) and text not in told:
                told.add(text)
                yield text
                break


def written_form(text: str, rng: np.random.Generator) -> str:
    """The same string as a person may type it: numerals, a capital, commas or a full stop."""
    words = text.split()
    match rng.integers(4):
        case 0:
            return " ".join(str(WORDS.index(word)) for word in words)
        case 1:
            return f"{text.capitalize()}."
        case 2:
            return ", ".join(words)
        case _:
            return f"{', '.join(words).capitalize()}."


def _random_text(length: int, rng: np.random.Generator) -> str:
    return " ".join(WORDS[index] for index in rng.integers(len(WORDS), size=length))
