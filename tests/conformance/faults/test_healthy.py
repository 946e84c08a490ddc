"""The engine without a fault passes everything, in both dtypes."""

from __future__ import annotations

import pytest

from gpa_conformance.cases import load_cases, select
from gpa_conformance.results import RunReport
from tests.conformance.faults.suite import DTYPES, Suite

WITHOUT = {
    "codec/stream": "no streaming decoder",
    **{case.id: "the checkpoint has no speech_domain.json" for case in select(load_cases(), "speech")},
}
"""Cases that this checkpoint or its codec cannot run, and words of the reason."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_healthy_engine_passes_everything(suite: Suite, dtype: str) -> None:
    report = suite.run(suite.healthy(dtype), None)
    assert {case.case: case.reason for case in report.cases if case.failed} == {}
    skipped = {case.case: case.reason for case in report.cases if case.status == "skipped"}
    assert skipped.keys() <= WITHOUT.keys()
    assert all(WITHOUT[case] in reason for case, reason in skipped.items())
    assert report.exit_code == 0
    assert _scored(report) >= 300


def _scored(report: RunReport) -> float:
    """Positions compared with the baseline."""
    return sum(case.metrics["positions"] for case in report.cases if case.family == "logits")
