"""What a case gathers on its way to a result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpa_conformance.cases import Case
from gpa_conformance.results import CaseResult, Check, Relation, make_check, thin_series

CONTRACT = "the Engine contract (gpa_engines.engine)"

MOST_COMPLAINTS = 6
"""Sentences that go into a reason; the rest is counted."""


class Findings:
    """Checks, figures and complaints of one case; a case passes when all of its checks do."""

    def __init__(self, case: Case) -> None:
        self.metrics: dict[str, float] = {}
        self._case = case
        self._checks: list[Check] = []
        self._complaints: list[str] = []
        self._explained: set[str] = set()
        self._notes: list[str] = []
        self._series: dict[str, list[float]] = {}
        self._tables: dict[str, list[dict[str, Any]]] = {}

    def add(self, checks: Iterable[Check]) -> None:
        """Checks that a limit made; a failed one without a complaint of its own is put into words in the reason."""
        for check in checks:
            self._checks.append(check)
            self.metrics.setdefault(check.metric, check.value)

    def check(self, metric: str, value: float, relation: Relation, limit: float, source: str = CONTRACT) -> Check:
        """Compare a figure with a limit that does not depend on the dtype."""
        check = make_check(metric, value, relation, limit, source)
        self.add([check])
        return check

    def count(self, metric: str, complaints: Sequence[str], source: str = CONTRACT) -> None:
        """A check that there is no complaint; those that there are become the reason."""
        self.check(metric, len(complaints), "==", 0, source)
        self._explained.add(metric)
        self._complaints.extend(complaints)

    def complain(self, *sentences: str) -> None:
        """Explain a failed check."""
        self._complaints.extend(sentences)

    def note(self, sentence: str) -> None:
        """Something that a reader should know of a case that passed, too; said once."""
        if sentence not in self._notes:
            self._notes.append(sentence)

    def plot(self, series: Mapping[str, Sequence[float]]) -> None:
        self._series.update({name: thin_series(values) for name, values in series.items()})

    def table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        self._tables.setdefault(name, []).extend(dict(row) for row in rows)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self._checks if not check.passed]

    def result(self) -> CaseResult:
        """The case's result; its time is filled in by the runner."""
        failed = self.failed
        sentences = list(dict.fromkeys(self._complaints)) if failed else []
        if failed:
            told = sentences[:MOST_COMPLAINTS]
            if len(sentences) > len(told):
                told.append(f"and {len(sentences) - len(told)} more")
            sentences = [*told, *(str(check) for check in failed if check.metric not in self._explained)]
        return CaseResult(
            case=self._case.id,
            family=self._case.family,
            title=self._case.title,
            status="failed" if failed else "passed",
            reason="; ".join([*sentences, *self._notes]),
            checks=tuple(self._checks),
            metrics=self.metrics,
            series=self._series,
            tables=self._tables,
        )
