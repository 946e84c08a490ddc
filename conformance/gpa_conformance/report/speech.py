"""The family "speech" in a report: what it costs in words, per case, per voice and per utterance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpa_conformance.report.facts import number
from gpa_conformance.results import RunReport

TITLE = "speech, in words, pitch and seconds"
COLUMNS = ("case", "figure", "engine (95 % interval)", "recordings", "of")
NOTE = (
    "A word is wrong that is replaced, left out or put in. Intervals are bootstrapped over utterances, those of shares "
    "of utterances exact. The recordings' figures are those of the same listener on the natural audio."
)

_COLUMN_WORDS = {"f0": "pitch, Hz", "f0_of_voice": "of the voice, Hz", "utterances": "utterances", "trained": ""}


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of a case. short: its name beside those of other engines, "" where it is not shown there."""

    case: str
    figure: str
    short: str
    found: str
    natural: str
    of: str

    def cells(self) -> tuple[str, ...]:
        """By `COLUMNS`."""
        return self.case, self.figure, self.found, self.natural, self.of


def rows(report: RunReport) -> list[Row]:
    """All figures of all cases that ran."""
    return [
        Row(
            case.case,
            str(each["figure"]),
            str(each["short"]),
            show(each),
            show(each, "natural") if "natural" in each else "",
            str(each["of"]),
        )
        for case in report.cases
        for each in case.tables.get("speech", ())
    ]


def voices(report: RunReport) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(case, columns, rows) of every case that tells of single voices."""
    return [(case.case, *_table(found)) for case in report.cases if (found := case.tables.get("speech_voices"))]


def wrong(report: RunReport) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(case, columns, rows) of the utterances that were not right, the first of each case."""
    return [(case.case, *_table(found)) for case in report.cases if (found := case.tables.get("speech_wrong"))]


def show(row: Mapping[str, Any], prefix: str = "") -> str:
    """ "7.8 % (6.1 to 9.8)": a figure and its interval. prefix: of the row's keys, "natural" for the recordings'."""
    value, low, high = (
        float(row[name])
        for name in ((prefix, f"{prefix}_low", f"{prefix}_high") if prefix else ("value", "low", "high"))
    )
    if row["unit"] == "share":
        return f"{_percent(value)} % ({_percent(low)} to {_percent(high)})"
    return f"{value:.3f} {row['unit']} ({low:.3f} to {high:.3f})"


def _percent(share: float) -> str:
    return "NaN" if math.isnan(share) else f"{100 * share:.1f}"


def _table(found: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    names = [name for name in found[0] if name != "trained"]
    columns = tuple(_COLUMN_WORDS.get(name, name) for name in names)
    return columns, [tuple(_cell(name, row.get(name, "")) for name in names) for row in found]


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if name.startswith("f0") else f"{_percent(value)} %"
    return number(value) if isinstance(value, int) else str(value)
