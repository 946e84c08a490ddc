"""Metrics against their definitions written out, on small rows where every number can be checked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpa_conformance.limits import load_limits
from gpa_conformance.metrics import LogitsComparison, LogitsMetrics, merge
from gpa_conformance.reference_rows import SAMPLE, TOP, FullRows, best_ids, keep_top, log_sum_exp

VOCABULARY = 3000
POSITIONS = 12


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return np.random.default_rng(0).normal(0.3, 1.6, (POSITIONS, VOCABULARY)).astype(np.float32)


@pytest.fixture(scope="module")
def noisy(reference: np.ndarray) -> np.ndarray:
    return reference + np.random.default_rng(1).normal(0, 0.02, reference.shape).astype(np.float32)


def full(reference: np.ndarray, x: np.ndarray, candidates: np.ndarray | None = None) -> LogitsMetrics:
    comparison = LogitsComparison(candidates)
    for start in range(0, len(reference), 5):
        positions = np.arange(start, min(start + 5, len(reference)))
        comparison.add(FullRows(positions, reference[positions]), x[positions])
    return comparison.result()


def top(reference: np.ndarray, x: np.ndarray, candidates: np.ndarray | None = None) -> LogitsMetrics:
    comparison = LogitsComparison(candidates)
    comparison.add(keep_top(reference, np.arange(len(reference)), candidates), x)
    return comparison.result()


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def test_every_metric_is_its_definition(reference: np.ndarray, noisy: np.ndarray) -> None:
    ref, x = reference.astype(np.float64), noisy.astype(np.float64)
    log_p, log_q = log_softmax(ref), log_softmax(x)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    best, chosen = ref.argmax(-1), x.argmax(-1)
    rows = np.arange(POSITIONS)
    regret = log_p[rows, best] - log_p[rows, chosen]
    five = [set(np.argsort(-r)[:5]) & set(np.argsort(-e)[:5]) for r, e in zip(ref, x, strict=True)]
    norms, own = np.linalg.norm(ref, axis=1), np.linalg.norm(x, axis=1)
    rel = np.linalg.norm(x - ref, axis=1) / norms
    cosine = (ref * x).sum(-1) / norms / own
    slopes = [np.polyfit(r, e, 1)[0] for r, e in zip(ref, x, strict=True)]
    wanted = {
        "positions": POSITIONS,
        "non_finite": 0,
        "rel_l2": np.linalg.norm(x - ref) / np.linalg.norm(ref),
        "rel_l2_max": rel.max(),
        "cosine": (ref * x).sum() / np.linalg.norm(ref) / np.linalg.norm(x),
        "cosine_min": cosine.min(),
        "top1": (best == chosen).mean(),
        "top1_matches": (best == chosen).sum(),
        "top5": np.mean([len(each) for each in five]),
        "top5_min": min(len(each) for each in five),
        "kl_mean": kl.mean(),
        "kl_p99": kl.max(),
        "kl_max": kl.max(),
        "regret_mean": regret.mean(),
        "regret_max": regret.max(),
        "delta_logp_max": np.abs(log_p - log_q).max(),
        "norm_ratio_min": (own / norms).min(),
        "norm_ratio_max": (own / norms).max(),
        "scale_min": min(slopes),
        "scale_max": max(slopes),
        "scale_error_max": max(abs(slope - 1) for slope in slopes),
        "offset_mean": (x.mean(-1) - ref.mean(-1)).mean(),
        "offset_max": np.abs(x.mean(-1) - ref.mean(-1)).max(),
    }
    summary = full(reference, noisy).summary()
    residual = summary.pop("residual")
    assert set(summary) == set(wanted)
    for name, value in wanted.items():
        assert summary[name] == pytest.approx(value, rel=1e-9, abs=1e-14), name
    assert residual == pytest.approx(summary["rel_l2"], rel=0.01)


def test_kl_and_regret_over_the_allowed_ids(reference: np.ndarray, noisy: np.ndarray) -> None:
    candidates = np.r_[5:90, 1000:1400, 2999]
    log_p, log_q = log_softmax(reference[:, candidates]), log_softmax(noisy[:, candidates])
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    rows = np.arange(POSITIONS)
    regret = log_p.max(-1) - log_p[rows, noisy[:, candidates].argmax(-1)]
    summary = full(reference, noisy, candidates).summary()
    assert summary["kl_allowed_max"] == pytest.approx(kl.max(), rel=1e-9)
    assert summary["regret_allowed_max"] == pytest.approx(regret.max(), abs=1e-12)
    assert "kl_allowed_max" not in full(reference, noisy).summary()


def test_blocks_are_no_more_than_blocks(reference: np.ndarray, noisy: np.ndarray) -> None:
    comparison = LogitsComparison(None)
    comparison.add(FullRows(np.arange(POSITIONS), reference), noisy)
    assert comparison.result().summary() == full(reference, noisy).summary()


def test_equal_logits_are_perfect(reference: np.ndarray) -> None:
    summary = full(reference, reference).summary()
    for name in ("rel_l2", "kl_max", "regret_max", "delta_logp_max", "scale_error_max", "offset_max", "residual"):
        assert summary[name] == 0, name
    assert (summary["top1"], summary["top5"]) == (1, 5)
    assert summary["cosine"] == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("compare", [full, top])
def test_one_bad_logit_fails_every_limit(reference: np.ndarray, value: float, compare) -> None:
    broken = reference.copy()
    broken[7, 1234] = value
    found = compare(reference, broken)
    summary = found.summary()
    assert summary["non_finite"] == 1
    assert found.non_finite.tolist() == [0] * 7 + [1] + [0] * 4
    assert summary["top1"] == 11 / 12
    assert summary["top5_min"] == 0
    limits = load_limits().for_dtype("mlx-4bit")
    checks = {check.metric: check for check in limits.checks(summary)}
    assert not any(check.passed for check in checks.values()), [str(each) for each in checks.values() if each.passed]


def test_a_bad_logit_outside_the_allowed_ids_fails_as_well(reference: np.ndarray) -> None:
    broken = reference.copy()
    broken[0, 0] = np.nan
    assert math.isnan(full(reference, broken, np.arange(10, 20)).summary()["kl_allowed_max"])


def test_ties_go_to_the_lowest_id() -> None:
    row = np.array([0.0, 3.0, 1.0, 3.0, 3.0, 1.0, 1.0], np.float32)
    assert best_ids(row, 5).tolist() == [1, 3, 4, 2, 5]
    assert best_ids(row, 1).tolist() == [1]
    assert best_ids(row, 99).tolist() == [1, 3, 4, 2, 5, 6, 0]
    swapped = row.copy()
    swapped[1] = np.nextafter(np.float32(3), np.float32(0))
    assert full(row[None], swapped[None]).summary()["top1"] == 0
    assert full(row[None], row[None]).summary()["top1"] == 1


@pytest.mark.parametrize("compare", [full, top])
def test_a_scale_is_told_from_everything_else(reference: np.ndarray, compare) -> None:
    summary = compare(reference, 1.5 * reference).summary()
    assert summary["scale_min"] == pytest.approx(1.5, rel=1e-6)
    assert summary["scale_max"] == pytest.approx(1.5, rel=1e-6)
    assert summary["residual"] < 1e-6
    assert summary["rel_l2"] == pytest.approx(0.5, rel=1e-6)
    assert summary["cosine"] == pytest.approx(1, abs=1e-12)
    assert summary["top1"] == 1
    assert summary["norm_ratio_max"] == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize("compare", [full, top])
def test_a_constant_is_invisible_to_softmax_and_told_all_the_same(reference: np.ndarray, compare) -> None:
    summary = compare(reference, reference - np.float32(8)).summary()
    assert summary["offset_mean"] == pytest.approx(-8, abs=1e-5)
    assert summary["offset_max"] == pytest.approx(8, abs=1e-5)
    assert summary["kl_max"] < 1e-11
    assert summary["residual"] < 1e-6
    assert summary["scale_error_max"] < 1e-6
    assert summary["rel_l2"] > 1


def test_log_probabilities_show_a_normaliser_of_0(reference: np.ndarray) -> None:
    found = full(reference, log_softmax(reference).astype(np.float32))
    assert np.abs(found.series["normaliser"]).max() < 1e-4
    assert found.series["reference_normaliser"].min() > 5


def test_kl_of_tiny_differences_does_not_drown_in_rounding(reference: np.ndarray) -> None:
    """To second order, KL is half the variance of the differences under the reference's distribution."""
    step = np.random.default_rng(4).normal(0, 1e-5, VOCABULARY)
    shifted = reference[:1].astype(np.float64) + step
    comparison = LogitsComparison(None)
    comparison.add(FullRows(np.arange(1), reference[:1]), shifted)
    log_p = log_softmax(reference[:1])[0]
    variance = (np.exp(log_p) * step**2).sum() - (np.exp(log_p) * step).sum() ** 2
    assert comparison.result().summary()["kl_mean"] == pytest.approx(variance / 2, rel=1e-3)


def test_a_large_difference_is_large_and_not_an_overflow() -> None:
    reference = np.array([[0.0, 1.0, 2.0]], np.float32)
    summary = full(reference, np.array([[3e38, 0.0, -3e38]], np.float32)).summary()
    assert summary["kl_max"] > 1e30
    assert summary["regret_max"] == pytest.approx(2.0)


def test_rows_of_another_position_are_recognised(reference: np.ndarray) -> None:
    late = np.roll(reference, -1, axis=0)
    found = full(reference, late)
    assert np.nanmin(found.series["cosine_next"]) > 0.999999
    assert np.isnan(found.series["cosine_next"][-1])
    assert np.nanmin(full(reference, np.roll(reference, 1, axis=0)).series["cosine_previous"]) > 0.999999


def test_shapes_that_do_not_fit_are_refused(reference: np.ndarray) -> None:
    comparison = LogitsComparison(None)
    with pytest.raises(ValueError, match="expected 12 rows"):
        comparison.add(FullRows(np.arange(POSITIONS), reference), reference[:3])
    with pytest.raises(ValueError, match="have 2999 columns"):
        comparison.add(FullRows(np.arange(POSITIONS), reference), reference[:, :-1])


def test_merging_is_comparing_together(reference: np.ndarray, noisy: np.ndarray) -> None:
    whole = full(reference, noisy).summary()
    parts = merge([full(reference[:4], noisy[:4]), full(reference[4:], noisy[4:])]).summary()
    assert parts == pytest.approx(whole)
    assert merge([]).summary() == {}


def test_merging_keeps_restricted_and_free_prompts_apart(reference: np.ndarray, noisy: np.ndarray) -> None:
    restricted = full(reference, noisy, np.arange(40))
    together = merge([full(reference, noisy), restricted]).summary()
    assert together["kl_allowed_max"] == restricted.summary()["kl_allowed_max"]
    assert together["kl_allowed_mean"] == restricted.summary()["kl_allowed_mean"]


class TestTopRows:
    """The baseline kept only the top of each row, and a sample of the rest."""

    def test_what_it_keeps(self, reference: np.ndarray) -> None:
        candidates = np.arange(100, 900)
        rows = keep_top(reference, np.arange(POSITIONS), candidates)
        assert rows.allowed is not None
        assert rows.top.ids.shape == (POSITIONS, TOP)
        assert rows.top.sample_ids.shape == (SAMPLE,)
        assert np.array_equal(rows.top.ids[3], np.argsort(-reference[3], kind="stable")[:TOP])
        assert rows.top.log_normaliser[3] == pytest.approx(np.log(np.exp(reference[3].astype(np.float64)).sum()))
        assert set(rows.allowed.ids.ravel()) <= set(candidates)
        assert set(rows.allowed.sample_ids) <= set(candidates)
        assert rows.allowed.count == 800

    def test_what_is_exact_is_exact(self, reference: np.ndarray, noisy: np.ndarray) -> None:
        candidates = np.arange(100, 900)
        whole = full(reference, noisy, candidates).summary()
        part = top(reference, noisy, candidates).summary()
        for name in ("top1", "top5", "top5_min", "regret_max", "regret_mean", "regret_allowed_max"):
            assert part[name] == pytest.approx(whole[name]), name
        for name in ("offset_mean", "offset_max", "norm_ratio_min", "norm_ratio_max", "positions", "non_finite"):
            assert part[name] == pytest.approx(whole[name], rel=1e-9, abs=1e-12), name

    def test_what_is_estimated_is_close(self, reference: np.ndarray, noisy: np.ndarray) -> None:
        candidates = np.arange(100, 900)
        whole = full(reference, noisy, candidates).summary()
        part = top(reference, noisy, candidates).summary()
        for name in ("rel_l2", "kl_mean", "kl_allowed_mean", "residual"):
            assert part[name] == pytest.approx(whole[name], rel=0.1), name
        assert part["cosine"] == pytest.approx(whole["cosine"], abs=1e-5)
        assert part["scale_max"] == pytest.approx(whole["scale_max"], abs=2e-3)
        assert part["delta_logp_max"] <= whole["delta_logp_max"]

    def test_it_says_what_is_not_exact(self, reference: np.ndarray, noisy: np.ndarray) -> None:
        found = top(reference, noisy)
        assert found.inexact["kl"] == "estimate"
        assert found.inexact["regret"] == "at least"
        assert not full(reference, noisy).inexact
        assert merge([full(reference, noisy), found]).inexact == found.inexact

    def test_regret_of_an_id_that_was_not_kept_is_a_lower_bound(self, reference: np.ndarray) -> None:
        wrong = reference.copy()
        kept = keep_sample(reference)
        worst = next(each for each in np.argsort(reference[0]).tolist() if each not in kept)
        wrong[0, worst] = 50
        exact, bound = full(reference, wrong).summary()["regret_max"], top(reference, wrong).summary()["regret_max"]
        assert 0 < bound <= exact
        lowest_kept = np.sort(reference[0])[-TOP]
        assert bound == pytest.approx(reference[0].max() - lowest_kept)

    def test_a_fault_far_below_the_top_is_seen(self, reference: np.ndarray) -> None:
        """A block of the vocabulary that is zeroed holds hardly any of the top."""
        wrong = reference.copy()
        wrong[:, 1000:2000] = 0
        exact = full(reference, wrong).summary()["rel_l2"]
        assert top(reference, wrong).summary()["rel_l2"] == pytest.approx(exact, rel=0.25)

    def test_a_vocabulary_smaller_than_the_top_is_exact(self, reference: np.ndarray, noisy: np.ndarray) -> None:
        small, other = reference[:, :200], noisy[:, :200]
        assert top(small, other).summary() == pytest.approx(full(small, other).summary(), rel=1e-9, abs=1e-15)


def keep_sample(reference: np.ndarray) -> set[int]:
    return set(keep_top(reference, np.arange(len(reference)), None).top.sample_ids.tolist())


def test_log_sum_exp_of_large_values() -> None:
    assert log_sum_exp(np.array([1000.0, 1000.0])) == pytest.approx(1000 + math.log(2))
