"""What a run found, and its JSON form."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from gpa_codecs.errors import GpaError
from gpa_conformance.results import (
    LONGEST_SERIES,
    CaseResult,
    RunReport,
    Status,
    make_check,
    thin_series,
)


def result(case: str, status: Status = "passed", reason: str = "") -> CaseResult:
    return CaseResult(case, case.partition("/")[0], f"title of {case}", status, reason)


def report(*cases: CaseResult) -> RunReport:
    return RunReport(
        engine={"backend": "torch", "dtype": "float32", "capabilities": frozenset({"logits", "batch"})},
        target="backend torch",
        model={"name": "tiny", "vocab_size": 5141},
        baseline={},
        versions={"numpy": "2"},
        machine={"cores": 2},
        seeds={"sampling": 1},
        command=("gpa-conformance", "run"),
        started="2026-01-01T00:00:00+00:00",
        seconds=1.5,
        cases=cases,
        digests={case.case: "0d" * 32 for case in cases},
    )


@pytest.mark.parametrize("relation", ["<=", ">=", "=="])
@pytest.mark.parametrize(("value", "limit"), [(math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan)])
def test_nan_meets_no_limit(relation, value: float, limit: float) -> None:
    assert not make_check("m", value, relation, limit, "source").passed


def test_a_limit_itself_is_met() -> None:
    assert make_check("m", 1.0, "<=", 1.0, "s").passed
    assert make_check("m", 1.0, ">=", 1.0, "s").passed
    assert make_check("m", 1.0, "==", 1.0, "s").passed
    assert not make_check("m", 1.0 + 1e-15, "<=", 1.0, "s").passed


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["passed"], 0),
        (["passed", "skipped", "known-failure"], 0),
        (["passed", "unexpected-pass"], 0),
        (["unexpected-pass"], 0),
        (["passed", "failed"], 1),
        (["passed", "error"], 1),
        (["skipped", "skipped"], 1),
        (["known-failure"], 1),
        ([], 1),
    ],
)
def test_exit_code_is_0_only_if_something_passed_and_nothing_failed(statuses: list[Status], code: int) -> None:
    assert report(*(result(f"logits/{n}", status) for n, status in enumerate(statuses))).exit_code == code


def test_families_are_counted_and_skips_say_why() -> None:
    found = report(
        result("logits/a"),
        result("logits/b"),
        result("batch/a"),
        result("batch/b", "skipped", "no batch"),
        result("batch/c", "skipped", "no batch"),
        result("cache/a", "error", "the engine died"),
        result("cache/b", "known-failure", "slow"),
    )
    assert found.family_lines() == [
        "logits 2/2",
        "batch 1/3 (2 skipped: no batch)",
        "cache 0/2 (1 failed, 1 known to fail)",
    ]
    assert (found.passed, found.failed, found.skipped, found.known) == (3, 1, 2, 1)


def test_a_case_with_a_failed_check_cannot_be_called_passed() -> None:
    failed = make_check("kl", 2.0, "<=", 1.0, "s")
    with pytest.raises(ValueError, match="not all of its checks"):
        CaseResult("logits/a", "logits", "t", "passed", checks=(failed,))


def test_a_report_survives_json_with_nan_and_infinity(tmp_path: Path) -> None:
    broken = replace(
        result("logits/a", "failed", "NaN"),
        checks=(make_check("kl", math.nan, "<=", 1.0, "s"),),
        metrics={"kl": math.nan, "regret": math.inf, "scale": -math.inf, "top1": 0.5},
        series={"kl": [0.0, math.nan]},
        tables={"rows": [{"prompt": "NaN-free", "rel_l2": math.nan}]},
    )
    file = tmp_path / "report.json"
    report(broken, result("logits/b")).to_json(file)
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = RunReport.from_json(file)
    assert math.isnan(again.cases[0].metrics["kl"])
    assert again.cases[0].metrics["regret"] == math.inf
    assert again.cases[0].metrics["scale"] == -math.inf
    assert math.isnan(again.cases[0].checks[0].value)
    assert not again.cases[0].checks[0].passed
    assert math.isnan(again.cases[0].series["kl"][1])
    assert math.isnan(again.cases[0].tables["rows"][0]["rel_l2"])
    assert again.cases[0].tables["rows"][0]["prompt"] == "NaN-free"
    assert again.to_dict() == RunReport.from_dict(again.to_dict()).to_dict()
    assert again.engine["capabilities"] == ["batch", "logits"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no 'schema'"),
        ('{"schema": "gpa-conformance/99"}', "gpa-conformance/99"),
        ('{"schema": "gpa-conformance/1"}', "has no 'engine'"),
    ],
)
def test_a_file_that_is_no_report_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(GpaError, match=message) as raised:
        RunReport.from_json(file)
    assert "other.json" in str(raised.value)


def test_a_damaged_case_is_named(tmp_path: Path) -> None:
    document = report(result("logits/a"), result("logits/b")).to_dict()
    document["cases"][1]["status"] = "fine"
    with pytest.raises(GpaError, match="case 1: status 'fine'"):
        RunReport.from_dict(document)
    del document["cases"][0]["title"]
    with pytest.raises(GpaError, match="case 0 has no 'title'"):
        RunReport.from_dict(document)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GpaError, match=r"absent\.json"):
        RunReport.from_json(tmp_path / "absent.json")


def test_thinning_keeps_every_peak_and_every_nan() -> None:
    values = [0.0] * 10_000
    values[1234], values[7777] = 9.0, math.nan
    thin = thin_series(values)
    assert len(thin) == LONGEST_SERIES
    assert 9.0 in thin
    assert sum(map(math.isnan, thin)) == 1
    assert thin_series([1, 2]) == [1.0, 2.0]
