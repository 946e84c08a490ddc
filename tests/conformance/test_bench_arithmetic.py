"""Rates, ratios and distances are what their definitions say."""

from __future__ import annotations

import numpy as np
import pytest

from gpa_codecs.errors import RequestError
from gpa_conformance.bench.contenders import logit_distance
from gpa_conformance.bench.rounds import Record, Sample, Spread, ratios, scaling
from gpa_conformance.bench.timing import Timed, Trace, decode_rate, lead
from gpa_conformance.bench.workload import ContenderSpec, Measurement, Workload, prompts, yardstick_dtype


def trace(moments: list[float], counts: list[int] | None = None) -> Trace:
    return Trace(wall=moments, cpu=[2 * moment for moment in moments], counts=counts or [1] * len(moments))


def rate_of(traces: list[Trace]) -> Timed:
    timed = decode_rate(traces)
    assert timed is not None
    return timed


def record(dtype: str, rates: dict[Measurement, list[float]]) -> Record:
    made = Record(ContenderSpec("engine", "torch", dtype, "cpu", 1), Workload())
    made.samples = [
        Sample(number, measurement, 10, 10 / rate, 20 / rate, rate, 0)
        for measurement, values in rates.items()
        for number, rate in enumerate(values)
    ]
    return made


def test_one_request_decodes_its_later_tokens_in_the_time_after_the_first() -> None:
    timed = rate_of([trace([1.0, 1.5, 2.0, 3.0])])
    assert (timed.tokens, timed.wall_s, timed.cpu_s) == (3, 2.0, 4.0)
    assert timed.tokens_per_s == pytest.approx(1.5)


def test_tokens_that_come_several_at_a_time_all_count() -> None:
    assert rate_of([trace([1.0, 2.0, 3.0], [1, 4, 4])]).tokens_per_s == pytest.approx(4.0)


def test_a_batch_counts_only_while_all_decode() -> None:
    # The first request decodes alone at 1 token/s until the second starts; then both make a token every 2 s.
    first = trace([0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 9.0])
    second = trace([3.01, 5.01, 7.01, 9.01, 9.5, 10.0])
    timed = rate_of([first, second])
    assert timed.tokens_per_s == pytest.approx(1.0)
    assert timed.wall_s == pytest.approx(9.0 - 3.01)


def test_steps_of_a_batch_are_not_miscounted_at_the_edges() -> None:
    # Sixteen rows in lock step, four steps/s, each row's delta a little after the one before.
    rows = [trace([step / 4 + row / 1000 for step in range(9)]) for row in range(16)]
    assert rate_of(rows).tokens_per_s == pytest.approx(64.0)


def test_requests_that_ran_one_after_the_other_have_no_batch_rate() -> None:
    assert decode_rate([trace([0.0, 1.0, 2.0]), trace([3.0, 4.0, 5.0])]) is None


def test_a_first_token_that_was_read_late_does_not_flatter() -> None:
    late = trace([2.9, 3.0, 4.0])
    late.settle(decode=3.0)
    assert rate_of([late]).tokens_per_s == pytest.approx(2 / 3)
    early = trace([1.0, 3.0, 5.0])
    early.settle(decode=3.0)
    assert rate_of([early]).tokens_per_s == pytest.approx(0.5)


def test_the_lead_is_what_the_earliest_request_made_before_the_last_started() -> None:
    assert lead([trace([0.0, 1.0, 2.0, 3.0]), trace([1.5, 2.5]), trace([2.5, 3.5])]) == 3
    assert lead([trace([1.0, 2.0])]) == 0


def test_a_ratio_is_the_median_of_the_ratios_of_each_round() -> None:
    alone = Measurement("decode")
    # The machine's speed changes between rounds, for both; the medians of the rates alone would give 20 / 10.
    ours = record("float32", {alone: [10.0, 30.0, 20.0]})
    yardstick = record("bfloat16", {alone: [10.0, 10.0, 5.0]})
    assert ratios(ours, alone, yardstick) == Spread(3.0, 1.0, 4.0, 3)


def test_a_restricted_head_is_held_against_the_yardsticks_full_head() -> None:
    restricted = Measurement("decode", 1, "restricted")
    ours = record("float32", {restricted: [30.0], Measurement("decode"): [20.0]})
    yardstick = record("float32", {Measurement("decode"): [10.0]})
    spread = ratios(ours, restricted, yardstick)
    assert spread is not None
    assert spread.median == pytest.approx(3.0)


def test_rounds_that_one_side_has_not_got_are_left_out() -> None:
    alone = Measurement("decode")
    spread = ratios(record("float32", {alone: [9.0, 8.0, 7.0]}), alone, record("float32", {alone: [3.0]}))
    assert spread == Spread(3.0, 3.0, 3.0, 1)
    assert ratios(record("float32", {alone: [9.0]}), alone, record("float32", {})) is None


def test_a_batch_is_compared_with_batch_one_of_the_same_head() -> None:
    measured = record(
        "int8",
        {
            Measurement("decode", 1, "full"): [10.0, 20.0],
            Measurement("decode", 16, "full"): [50.0, 60.0],
            Measurement("decode", 1, "restricted"): [100.0, 100.0],
            Measurement("decode", 16, "restricted"): [200.0, 200.0],
        },
    )
    assert scaling(measured, Measurement("decode", 16, "full")) == Spread(4.0, 3.0, 5.0, 2)
    assert scaling(measured, Measurement("decode", 16, "restricted")) == Spread(2.0, 2.0, 2.0, 2)
    assert scaling(measured, Measurement("decode", 1, "full")) is None


def test_cpu_time_per_token_does_not_depend_on_the_edges_of_the_window() -> None:
    (sample,) = record("float32", {Measurement("decode"): [5.0]}).samples
    assert sample.cpu_s_per_token == pytest.approx(0.4)


def test_the_distance_of_logits_is_relative_to_the_reference() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 5.0]], dtype=np.float32)
    logits = reference + np.array([[0.0, 0.0], [6.0, 0.0]], dtype=np.float32)
    distance = logit_distance(logits, reference)
    assert distance["rel_l2"] == pytest.approx(6 / 50**0.5)
    assert distance["worst_rel_l2"] == pytest.approx(6 / 5)
    assert (distance["top1_agreement"], distance["positions"]) == (0.5, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_have_no_distance(value: float) -> None:
    logits = np.ones((2, 3), dtype=np.float32)
    logits[1, 2] = value
    with pytest.raises(RequestError, match="NaN or infinity"):
        logit_distance(logits, np.ones((2, 3), dtype=np.float32))


def test_quantised_engines_are_held_against_bfloat16() -> None:
    assert [yardstick_dtype(name) for name in ("float32", "float16", "int8", "q4_k_m")] == [
        "float32",
        "float16",
        "bfloat16",
        "bfloat16",
    ]


def test_prompts_repeat_with_their_seed_and_differ_from_each_other() -> None:
    first = prompts(1, 3, 50, 5000)
    assert first == prompts(1, 3, 50, 5000)
    assert len({*first, *prompts(2, 3, 50, 5000)}) == 6
    assert all(0 <= token < 5000 for prompt in first for token in prompt)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_tokens": 0}, "prompt-tokens is 0"),
        ({"new_tokens": 1}, "new-tokens is 1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"batches": (0,)}, "batch is 0"),
        ({"batches": ()}, "at least one batch"),
        ({"heads": ("half",)}, "head is 'half'"),
        ({"logit_positions": -1}, "logit-positions is -1"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        Workload(**change)


def test_sizes_beyond_the_context_are_refused() -> None:
    with pytest.raises(RequestError, match="need 264 positions; the model has 256"):
        Workload().check_context(256)
