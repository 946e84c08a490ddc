"""An engine whose forward pass, head, cache or batching is wrong is caught, in both dtypes."""

from __future__ import annotations

import pytest

from tests.conformance.faults.suite import DTYPES, Fault, Suite, expect_caught, result

FAULTS = [
    Fault("first_position_twice", "logits/ascend-1,logits/spread", "rel_l2", "position 0 is right"),
    Fault("decoding_one_later", "cache/forced", "lost_competitions", "the prefill says otherwise"),
    Fault("chunk_one_later", "logits/chunks", "rel_l2", "a seam between chunks"),
    Fault("chunk_loses_an_id", "logits/chunks,cache/prefixes", "rel_l2"),
    Fault("attention_sharper", "logits/spread,logits/stt-speech", "rel_l2", "position 0 is right"),
    Fault("sees_the_future", "cache/prefixes,logits/ascend-1", "rel_l2", "differs most from the whole"),
    Fault("logits_scaled", "logits/ascend-1", "rel_l2", "the reference's times 1.5, the same at every position"),
    Fault("logits_shifted", "logits/ascend-1", "rel_l2", "plus a constant, on average 3, the same at every position"),
    Fault("log_probabilities", "logits/ascend-1,contract/vocabulary", "rel_l2", "these are log-probabilities"),
    Fault("probabilities", "logits/ascend-1", "rel_l2", "these are probabilities"),
    Fault("one_column_wrong", "logits/ascend-1", "rel_l2"),
    Fault("neighbours_leak", "batch/eight,batch/neighbours,contract/concurrent", "answers that differ", "as alone"),
    Fault("slot_keeps_its_start", "cache/greedy", "regret_max", "the cache, its positions"),
    Fault("cancel_leaks", "contract/cancel", ""),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_faulty_model_is_caught(suite: Suite, fault: Fault, dtype: str) -> None:
    report = suite.run(suite.planted(f"altered_models:{fault.name}", dtype), fault.caught_by)
    expect_caught(report, fault)


COMPANY = "batch/eight,batch/eight-sampled,batch/late,batch/neighbours,contract/concurrent"


def test_rounding_that_depends_on_the_batch_is_no_fault_where_nobody_promises_otherwise(suite: Suite) -> None:
    report = suite.run(suite.planted("altered_models:company_rounds_as_declared", "bfloat16"), COMPANY)
    assert {case.case: case.reason for case in report.cases if case.failed} == {}
    parted = {case.case for case in report.cases if "part by rounding that depends on the batch" in case.reason}
    assert {"batch/eight-sampled", "contract/concurrent"} <= parted, "greedy and drawn answers"
    promised = suite.run(suite.planted("altered_models:company_rounds", "bfloat16"), COMPANY)
    assert parted <= {case.case for case in promised.cases if case.failed}
    assert "rounding that depends on the batch" in result(promised, "contract/concurrent").reason


@pytest.mark.parametrize("fault", ["company_rounds_as_declared", "neighbours_leak_without_promise"])
def test_what_is_more_than_rounding_is_caught_without_a_promise_too(suite: Suite, fault: str) -> None:
    report = suite.run(suite.planted(f"altered_models:{fault}", "float32"), "batch/eight,contract/concurrent")
    assert all("more than rounding: a leak between requests" in case.reason for case in report.cases if case.failed)
    assert {case.case for case in report.cases if case.failed} == {"batch/eight", "contract/concurrent"}


@pytest.mark.slow
def test_cancel_that_does_nothing_is_caught(suite: Suite) -> None:
    """It takes long, because what is cancelled runs on; the dtype plays no part."""
    fault = Fault("cancel_does_nothing", "contract/cancel", "seconds_of_cancelling", "still run")
    expect_caught(suite.run(suite.planted("altered_models:cancel_does_nothing", "float32"), fault.caught_by), fault)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factory", ["untouched", "all_positions_later"])
def test_what_is_no_fault_passes(suite: Suite, factory: str, dtype: str) -> None:
    """A rotary embedding knows distances alone, so that counting from 1 is the same model."""
    report = suite.run(
        suite.planted(f"altered_models:{factory}", dtype),
        "logits/spread,logits/stt-speech,cache/greedy,cache/forced,batch/neighbours",
    )
    assert [case.reason for case in report.cases if case.status != "passed"] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_report_tells_scale_shift_and_normalisation_apart(suite: Suite, dtype: str) -> None:
    """Each moves its own figure: scale, offset, log-sum-exp."""
    scaled, shifted, normalised = (
        result(suite.run(suite.planted(f"altered_models:{name}", dtype), "logits/stt-speech"), "logits/stt-speech")
        for name in ("logits_scaled", "logits_shifted", "log_probabilities")
    )
    assert scaled.metrics["scale_min"] == pytest.approx(1.5, rel=0.01)
    assert abs(scaled.metrics["offset_mean"]) < 0.1
    assert scaled.metrics["kl_max"] > 1e-3
    assert shifted.metrics["offset_mean"] == pytest.approx(3, abs=0.01)
    assert shifted.metrics["scale_max"] == pytest.approx(1, abs=0.03)
    assert shifted.metrics["kl_max"] <= 5e-4
    for words, case in (("the reference's times", scaled), ("plus a constant", shifted), ("log-prob", normalised)):
        assert [words in other.reason for other in (scaled, shifted, normalised)].count(True) == 1, words
        assert words in case.reason
