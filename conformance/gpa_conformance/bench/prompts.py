"""The eight prompts of the Ascend report, from the conformance suite's own cases."""

from __future__ import annotations

from dataclasses import dataclass

from gpa_conformance.cases import Case, load_cases


@dataclass(frozen=True, slots=True)
class ReportPrompt:
    """One prompt. case: the case of the suite that it comes from."""

    case: Case
    text: str


def report_prompts() -> list[ReportPrompt]:
    """In the report's order."""
    cases = sorted((case for case in load_cases() if "ascend" in case.spec), key=lambda case: case.spec["ascend"])
    return [ReportPrompt(case, case.spec["prompt"]["text"]) for case in cases]
