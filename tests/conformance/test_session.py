"""What a run makes of engines that crash, hang, break again and again, or are closed; and of a healthy one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from gpa_codecs.errors import GpaError
from gpa_conformance.baseline import Baseline
from gpa_conformance.cases import load_cases, select
from gpa_conformance.limits import load_limits
from gpa_conformance.results import CaseResult, RunReport
from gpa_conformance.runner import run_cases
from gpa_conformance.session import MOST_RESTARTS, Setup
from gpa_conformance.target import make_target
from gpa_engines.checkpoint import Checkpoint

CROOKED = "tests.conformance.crooked_engines"


def setup_for(baseline: Baseline, model: Path, factory: str = f"{CROOKED}:healthy") -> Setup:
    checkpoint = Checkpoint.open(model)
    return Setup(
        target=make_target(model, engine=factory, options={}),
        baseline=baseline,
        limits=load_limits(),
        cases={case.id: case for case in load_cases()},
        space=checkpoint.token_space(),
    )


def run(setup: Setup, cases: str) -> RunReport:
    checkpoint = Checkpoint.open(setup.target.model_dir)
    return asyncio.run(run_cases(setup, checkpoint, select(load_cases(), cases), command=("gpa-conformance", "run")))


def only(report: RunReport, case: str) -> CaseResult:
    return next(each for each in report.cases if each.case == case)


@pytest.mark.parametrize("isolate", [True, False])
def test_a_healthy_engine_passes_wherever_it_lives(
    text_baseline: Baseline, tiny_checkpoint: Path, isolate: bool
) -> None:
    setup = replace(setup_for(text_baseline, tiny_checkpoint), isolate=isolate)
    report = run(setup, "logits/ascend-1,logits/spread,contract/close,contract/stop,generate/ascend-1,cache/prefixes")
    statuses = {case.case: case.status for case in report.cases}
    assert statuses.pop("contract/stop") == "skipped"  # one of its prompts is of a clip
    assert set(statuses.values()) == {"passed"}, {case.case: case.reason for case in report.cases}
    assert report.exit_code == 0
    assert report.engine["isolated"] is isolate


def test_someone_elses_engine_without_torch_or_batching_passes(text_baseline: Baseline, tiny_checkpoint: Path) -> None:
    setup = setup_for(text_baseline, tiny_checkpoint, "tests.conformance.numpy_engine:create")
    report = run(setup, "logits,cache,generate,contract,sampling/top-k,sampling/plain")
    failed = {case.case: case.reason for case in report.cases if case.failed}
    assert not failed
    assert report.passed > 30
    assert report.engine["backend"] == "numpy"


def test_a_crash_fails_the_case_with_its_reason_and_the_run_goes_on(
    text_baseline: Baseline, tiny_checkpoint: Path
) -> None:
    setup = setup_for(text_baseline, tiny_checkpoint, f"{CROOKED}:aborting_at_one_id")
    report = run(setup, "logits/mixed-1,logits/one-id,logits/spread,contract/repeat,generate/ascend-1")
    broken = only(report, "logits/one-id")
    assert broken.status == "error"
    assert "killed by SIGABRT; it last printed: assertion failed in the native library" in broken.reason
    assert only(report, "logits/spread").status == "passed"
    assert only(report, "generate/ascend-1").status == "passed"
    assert report.exit_code == 1


@pytest.mark.parametrize("factory", ["hanging_at_one_id", "waiting_at_one_id"])
def test_a_hang_ends_at_the_time_limit(text_baseline: Baseline, tiny_checkpoint: Path, factory: str) -> None:
    setup = replace(setup_for(text_baseline, tiny_checkpoint, f"{CROOKED}:{factory}"), case_timeout=3.0)
    report = run(setup, "logits/one-id,logits/spread")
    assert only(report, "logits/one-id").status == "error"
    assert "no result within 3 s" in only(report, "logits/one-id").reason
    assert only(report, "logits/one-id").seconds < 10
    assert only(report, "logits/spread").status == "passed"


def test_an_engine_that_waits_for_ever_in_this_process_ends_at_the_time_limit(
    text_baseline: Baseline, tiny_checkpoint: Path
) -> None:
    setup = setup_for(text_baseline, tiny_checkpoint, f"{CROOKED}:waiting_at_one_id")
    report = run(replace(setup, case_timeout=2.0, isolate=False), "logits/one-id,logits/spread")
    assert [case.status for case in report.cases] == ["error", "passed"]


def test_an_engine_that_always_breaks_is_given_up(text_baseline: Baseline, tiny_checkpoint: Path) -> None:
    setup = setup_for(text_baseline, tiny_checkpoint, f"{CROOKED}:exiting_always")
    report = run(setup, "logits/ascend-1,logits/ascend-2,logits/ascend-3,logits/ascend-4,logits/ascend-5")
    reasons = [case.reason for case in report.cases]
    assert all(case.status == "error" for case in report.cases)
    assert all("exit code 7" in reason for reason in reasons)
    assert [reason.startswith("GpaError: given up") for reason in reasons].count(True) == 5 - MOST_RESTARTS


def test_an_exception_is_the_cases_own(text_baseline: Baseline, tiny_checkpoint: Path) -> None:
    setup = setup_for(text_baseline, tiny_checkpoint, f"{CROOKED}:raising_at_one_id")
    report = run(setup, "logits/one-id,logits/spread")
    assert [case.status for case in report.cases] == ["error", "passed"]
    assert "ZeroDivisionError: the trigger was pulled" in report.cases[0].reason


def test_what_cannot_be_loaded_is_said_at_once(text_baseline: Baseline, tiny_checkpoint: Path) -> None:
    with pytest.raises(GpaError, match=r"could not be loaded: .*SIGABRT; it last printed: cannot map the weights"):
        run(setup_for(text_baseline, tiny_checkpoint, f"{CROOKED}:aborting_at_load"), "logits")


def test_a_dtype_without_limits_is_refused_unless_others_are_chosen(
    text_baseline: Baseline, tiny_checkpoint: Path
) -> None:
    setup = setup_for(text_baseline, tiny_checkpoint, f"{CROOKED}:strange_dtype")
    with pytest.raises(GpaError, match="no limits for dtype 'posit16'"):
        run(setup, "logits/ascend-1")
    report = run(replace(setup, limits_as="float32"), "logits/ascend-1")
    assert report.passed == 1
    assert report.engine["limits"] == "float32"


def test_what_the_engine_or_the_baseline_lacks_is_skipped_with_the_reason(
    text_baseline: Baseline, tiny_checkpoint: Path
) -> None:
    setup = setup_for(text_baseline, tiny_checkpoint, f"{CROOKED}:bare")
    report = run(
        setup, "logits/ascend-1,contract/allowed,contract/seed,logits/stt-speech,codec/encode-speech,contract/usage"
    )
    reasons = {case.case: (case.status, case.reason) for case in report.cases}
    assert reasons["logits/ascend-1"] == ("skipped", "no logits")
    assert reasons["contract/seed"] == ("skipped", "no seed")
    assert reasons["contract/allowed"] == ("skipped", "no allowed")
    assert reasons["codec/encode-speech"] == ("skipped", "there is no codec")
    assert reasons["contract/usage"][0] == "passed"


def test_a_report_says_what_is_needed_to_repeat_the_run(text_baseline: Baseline, tiny_checkpoint: Path) -> None:
    setup = replace(setup_for(text_baseline, tiny_checkpoint), seed=3, known={"logits/ascend-1": "never"})
    report = run(setup, "logits/ascend-1,contract/seed")
    assert report.cases[0].status == "unexpected-pass"
    assert report.seeds["offset"] == 3
    assert report.command == ("gpa-conformance", "run")
    assert report.model["files"].keys() == report.baseline["files"].keys()
    assert report.versions["numpy"]
    assert report.target == f"--engine {CROOKED}:healthy"
    assert report.baseline["made_by"] == "torch float32 on cpu"
