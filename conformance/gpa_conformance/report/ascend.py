"""The table of the Ascend report: its four figures per prompt against its four limits.

Its limits decide nothing here: they know no dtype, a healthy bfloat16 engine may be beyond them, and a broken one
within. They are given because readers of that report know them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from gpa_conformance.limits import DtypeLimits, load_limits
from gpa_conformance.report.facts import show_limit, show_value
from gpa_conformance.results import Check, RunReport

TITLE = "as in the Ascend report"
Scope = Literal["last", "all"]
SCOPES: dict[Scope, str] = {"last": "last position of each prompt", "all": "all positions"}
COLUMNS = ("prompt", "rel_L2 %", "cosine", "top-1", "top-5", "verdict")

_TABLES: dict[Scope, str] = {"last": "ascend", "all": "ascend_all_positions"}
_NAMES = {"rel_l2": "rel_L2", "cosine": "cosine", "top1": "top-1", "top5": "top-5"}


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, or the mean of several. rel_l2, top1: shares. top5: ids shared by the best fives, 0 to 5.

    positions: how many were scored.
    """

    prompt: str
    rel_l2: float
    cosine: float
    top1: float
    top5: float
    positions: int = 1

    def checks(self) -> tuple[Check, ...]:
        """The four figures against the four limits."""
        return _limits().checks({name: getattr(self, name) for name in _NAMES})

    @property
    def verdict(self) -> str:
        return "PASS" if all(check.passed for check in self.checks()) else "FAIL"

    def cells(self) -> tuple[str, ...]:
        """By `COLUMNS`; a single position's top-1 is "yes" or "no"."""
        return (
            self.prompt,
            "NaN" if math.isnan(self.rel_l2) else f"{100 * self.rel_l2:.4f}",
            "NaN" if math.isnan(self.cosine) else f"{self.cosine:.6f}",
            f"{100 * self.top1:.1f} %" if self.positions > 1 else "yes" if self.top1 else "no",
            f"{self.top5:.2f}/5" if self.positions > 1 else f"{self.top5:.0f}/5",
            self.verdict,
        )


def rows(report: RunReport, scope: Scope) -> list[Row]:
    """A row per prompt of the Ascend report that was run, in its order."""
    found = [row for case in report.cases for row in case.tables.get(_TABLES[scope], ())]
    return [
        Row(str(row["prompt"]), *(float(row[name]) for name in _NAMES), positions=int(row.get("positions", 1)))
        for row in found
    ]


def total(found: Sequence[Row]) -> Row:
    """Means over all positions of at least one row; a NaN in any of them is one here."""
    positions = sum(row.positions for row in found)
    means = (sum(getattr(row, name) * row.positions for row in found) / positions for name in _NAMES)
    return Row(f"mean of {len(found)}", *means, positions=positions)


def verdicts(row: Row) -> list[str]:
    """A line per limit: "PASS rel_L2 0.0003 % ≤ 1 %"."""
    return [
        f"{'PASS' if check.passed else 'FAIL'} {_NAMES[check.metric]} {show_value(check.metric, check.value)} "
        f"{show_limit(check)}"
        for check in row.checks()
    ]


@cache
def _limits() -> DtypeLimits:
    return load_limits().ascend
