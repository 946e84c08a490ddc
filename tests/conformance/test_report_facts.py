"""What all forms of the report say: verdict, decisive figures, numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gpa_conformance.report import ascend
from gpa_conformance.report.facts import decisive, limited, number, proof, show_check, show_value, used, verdict
from gpa_conformance.results import CaseResult, make_check
from tests.conformance.sample_reports import sample_report


def case_of(*checks: tuple[str, float, str, float]) -> CaseResult:
    made = tuple(make_check(metric, value, relation, limit, "here") for metric, value, relation, limit in checks)  # type: ignore[arg-type]
    status = "passed" if all(check.passed for check in made) else "failed"
    return CaseResult("logits/x", "logits", "a case", status, checks=made)


def test_a_passed_run_is_the_same_model() -> None:
    found = verdict(sample_report())
    assert found.passed
    assert found.sentence.startswith("torch bfloat16 on cpu is the same model as far as this run can see: all ")
    assert found.notes == ()


def test_a_failed_run_is_not_the_same_model_and_tells_what_to_know() -> None:
    report = sample_report(fault=True)
    found = verdict(report)
    assert not found.passed
    assert f"not the same model: {report.failed} of the" in found.sentence
    assert any("4 cases skipped" in note for note in found.notes)
    assert any("1 known failure" in note for note in found.notes)
    assert any("remove them there" in note for note in found.notes)


def test_a_run_that_only_skipped_proves_nothing() -> None:
    report = sample_report()
    skipped = tuple(CaseResult(c.case, c.family, c.title, "skipped", "no logits") for c in report.cases)
    report = replace(report, cases=skipped)
    assert not verdict(report).passed
    assert "nothing is proven" in verdict(report).sentence
    assert "says nothing about the logits" in proof(report)


def test_the_decisive_check_is_the_one_nearest_to_its_limit_or_furthest_beyond() -> None:
    near = case_of(("kl_max", 4e-4, "<=", 5e-4), ("rel_l2", 0.01, "<=", 0.03))
    broken = case_of(("kl_max", 6e-4, "<=", 5e-4), ("rel_l2", 0.3, "<=", 0.03), ("cosine", 0.999, ">=", 0.99))
    for case, metric in ((near, "kl_max"), (broken, "rel_l2")):
        found = decisive(case)
        assert found is not None
        assert found.metric == metric


def test_a_nan_decides_over_everything() -> None:
    found = decisive(case_of(("kl_max", 1e9, "<=", 5e-4), ("rel_l2", math.nan, "<=", 0.03)))
    assert found is not None
    assert found.metric == "rel_l2"
    assert show_check(found) == "rel_l2 NaN % is not ≤ 3 %"


@pytest.mark.parametrize(
    ("metric", "value", "relation", "limit", "share"),
    [
        ("rel_l2", 0.015, "<=", 0.03, 0.5),
        ("rel_l2", 0.06, "<=", 0.03, 2),
        ("cosine", 0.995, ">=", 0.99, 0.5),
        ("snr_db", 120, ">=", 60, 0.5),
        ("non_finite", 0, "==", 0, 0),
        ("non_finite", 1, "==", 0, math.inf),
        ("snr_db", math.inf, ">=", 60, 0),
    ],
)
def test_the_share_of_a_limit_that_a_value_uses(
    metric: str, value: float, relation: str, limit: float, share: float
) -> None:
    assert used(make_check(metric, value, relation, limit, "")) == pytest.approx(share)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
        (3.0, "3"),
        (0.0123456, "0.01235"),
        (0.99999997, "0.99999997"),
        (99.9996, "99.9996"),
        (49.99999999, "50"),
        (3.1e-09, "3.1e-09"),
    ],
)
def test_numbers_are_never_rounded_up_to_perfect(value: float, text: str) -> None:
    assert number(value) == text


def test_units_follow_the_metric() -> None:
    assert show_value("rel_l2", 0.0124) == "1.24 %"
    assert show_value("kl_max", 3e-5) == "3e-05 nats"
    assert show_value("top5", 4.5) == "4.5 of 5"
    assert show_value("anything", 2) == "2"


def test_the_worst_value_of_every_limit_is_found() -> None:
    report = sample_report()
    worst = {each.worst.metric: each for each in limited(report)}
    expected = max(case.metrics["kl_max"] for case in report.cases if "kl_max" in case.metrics)
    assert worst["kl_max"].worst.value == expected
    assert worst["kl_max"].cases == sum("kl_max" in case.metrics for case in report.cases)
    assert "differing_tokens" not in worst, "what is no limit of the file has its place in its case"


def test_the_ascend_table_has_the_four_figures_and_its_own_verdict() -> None:
    rows = ascend.rows(sample_report("float32"), "last")
    assert len(rows) == 8
    assert rows[0].prompt == "Hello, how are you doing today?"
    assert rows[0].cells()[3:] == ("yes", "5/5", "PASS")
    total = ascend.total(rows)
    assert total.cells()[0] == "mean of 8"
    assert [line.split()[0] for line in ascend.verdicts(total)] == ["PASS"] * 4


def test_the_ascend_table_never_passes_a_nan() -> None:
    row = ascend.Row("a prompt", math.nan, math.nan, 0.0, 0.0)
    assert row.verdict == "FAIL"
    assert row.cells() == ("a prompt", "NaN", "NaN", "no", "0/5", "FAIL")
    assert ascend.total([row, ascend.Row("other", 0.001, 1.0, 1.0, 5.0)]).verdict == "FAIL"
