"""Figures of the family "speech" with their intervals, and how a report tells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpa_conformance.speech.words import WordErrors, word_errors
from gpa_conformance.statistics import Interval, bootstrap_ratio, error_rate

Words = Sequence[str]


@dataclass(frozen=True, slots=True)
class Hearing:
    """Word errors of a list of utterances, as one listener heard them."""

    errors: tuple[WordErrors, ...]

    @classmethod
    def of(cls, expected: Sequence[Words], heard: Sequence[Words]) -> Hearing:
        return cls(tuple(word_errors(*pair) for pair in zip(expected, heard, strict=True)))

    @property
    def counts(self) -> list[int]:
        return [each.count for each in self.errors]

    @property
    def words(self) -> list[int]:
        return [each.words for each in self.errors]

    @property
    def rate(self) -> Interval:
        """Word error rate."""
        return error_rate(self.counts, self.words)

    @property
    def right(self) -> int:
        """Utterances without an error."""
        return sum(not count for count in self.counts)

    def beyond(self, other: Hearing) -> Interval:
        """How much higher the rate is than another's of the same utterances: the differences are drawn in pairs."""
        if self.words != other.words:
            raise ValueError("the two hearings are of different utterances")
        differences = [own - theirs for own, theirs in zip(self.counts, other.counts, strict=True)]
        return bootstrap_ratio(differences, self.words)

    def part(self, chosen: Sequence[bool]) -> Hearing:
        """Some of the utterances."""
        return Hearing(tuple(each for each, wanted in zip(self.errors, chosen, strict=True) if wanted))


def row(
    figure: str, unit: str, found: Interval, of: str, natural: Interval | None = None, short: str = ""
) -> dict[str, Any]:
    """A row of the table "speech" of a case's result.

    unit: "share", or that of the value. of: what it was measured over ("108 words"). natural: the same figure of the
    recordings. short: the name of the figure where a matrix of engines shows it, "" where it does not.
    """
    values: dict[str, Any] = {"figure": figure, "short": short, "unit": unit, "of": of}
    values |= {"value": found.value, "low": found.low, "high": found.high}
    if natural is not None:
        values |= {"natural": natural.value, "natural_low": natural.low, "natural_high": natural.high}
    return values
