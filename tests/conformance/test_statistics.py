"""Bounds, tests and corrections against published values, exact sums and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpa_conformance.statistics import (
    chi_square,
    chi_square_tail,
    clopper_pearson,
    holm,
    lower_bound,
    trials_without_a_miss,
    upper_gamma,
    what_it_proves,
)


def at_least(successes: int, trials: int, share: float) -> float:
    return math.fsum(
        math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(successes, trials + 1)
    )


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # NIST Dataplot's reference manual and R's binom.test give these two-sided 95 % intervals.
    [
        (4, 20, 0.0573, 0.4366),
        (10, 100, 0.0490047, 0.1762226),
        (0, 10, 0.0, 0.3084971),
        (10, 10, 0.6915029, 1.0),
        (4, 10, 0.1215523, 0.7376219),
    ],
)
def test_clopper_pearson_has_the_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert clopper_pearson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(1, 7), (8, 8), (97, 100), (299, 300), (30, 400), (2300, 2360)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_a_bound_is_where_the_count_becomes_that_unlikely(successes: int, trials: int, confidence: float) -> None:
    bound = lower_bound(successes, trials, confidence)
    assert at_least(successes, trials, bound) == pytest.approx(1 - confidence, rel=1e-6)
    low, high = clopper_pearson(successes, trials, confidence)
    assert low < bound <= successes / trials <= high


def test_bounds_hold_as_often_as_they_say() -> None:
    random = np.random.default_rng(3)
    bounds = {count: lower_bound(count, 60) for count in range(61)}
    missed = np.mean([bounds[count] > 0.9 for count in random.binomial(60, 0.9, 20_000).tolist()])
    assert missed <= 0.05


def test_what_eight_of_eight_and_299_prove() -> None:
    assert what_it_proves(8, 8) == (
        "8/8 shows only > 68.8% at 95% confidence; > 99% needs 299 positions without a miss"
    )
    assert what_it_proves(299, 299) == "299/299 shows > 99.0% at 95% confidence"
    assert "only > 98.9%" in what_it_proves(298, 298)
    assert what_it_proves(0, 0) == "0/0 shows nothing"
    assert what_it_proves(0, 5).startswith("0/5 shows only > 0.0%")


def test_as_many_trials_as_are_needed_and_no_fewer() -> None:
    assert trials_without_a_miss(0.99) == 299
    for share in (0.5, 0.9, 0.95, 0.99, 0.999):
        needed = trials_without_a_miss(share)
        assert lower_bound(needed, needed) > share
        assert needed == 1 or lower_bound(needed - 1, needed - 1) <= share


@pytest.mark.parametrize(
    ("statistic", "degrees", "tail"),
    # Critical values of the NIST/SEMATECH e-Handbook, table 1.3.6.7.4.
    [
        (3.841, 1, 0.05),
        (6.635, 1, 0.01),
        (18.307, 10, 0.05),
        (29.588, 10, 0.001),
        (124.342, 100, 0.05),
        (1.145, 5, 0.95),
    ],
)
def test_chi_square_tails_have_the_published_values(statistic: float, degrees: int, tail: float) -> None:
    assert chi_square_tail(statistic, degrees) == pytest.approx(tail, rel=2e-3)


@pytest.mark.parametrize("x", [0.0, 1e-9, 0.3, 1.0, 2.5, 10.0, 80.0, 700.0])
def test_upper_gamma_against_closed_forms(x: float) -> None:
    assert upper_gamma(1, x) == pytest.approx(math.exp(-x), rel=1e-12)
    assert upper_gamma(0.5, x) == pytest.approx(math.erfc(math.sqrt(x)), rel=1e-10)
    poisson = math.fsum(math.exp(-x) * x**k / math.factorial(k) for k in range(7))
    assert upper_gamma(7, x) == pytest.approx(poisson, rel=1e-11)


def test_upper_gamma_of_an_infinite_statistic_is_0() -> None:
    assert upper_gamma(3, math.inf) == 0
    with pytest.raises(ValueError, match="above 0"):
        upper_gamma(0, 1)


def test_rare_outcomes_are_merged_until_each_bin_expects_five() -> None:
    probabilities = np.array([0.5, 0.3, 0.1, 0.06, 0.02, 0.02])
    test = chi_square([48, 33, 9, 5, 3, 2], probabilities)
    assert test.bins == 4  # the last two expect four together, so the fourth joins them
    assert test.degrees == 3
    expected = (48 - 50) ** 2 / 50 + (33 - 30) ** 2 / 30 + (9 - 10) ** 2 / 10
    assert test.statistic == pytest.approx(expected)


def test_draws_of_the_impossible_have_no_probability() -> None:
    test = chi_square([50, 49, 1], [0.5, 0.5, 0.0])
    assert (test.p_value, test.impossible) == (0.0, 1)


def test_a_single_outcome_decides_nothing() -> None:
    assert chi_square([100], [1.0]).p_value == 1.0
    assert chi_square([3, 0], [0.9, 0.1]).p_value == 1.0


@pytest.mark.parametrize(
    ("counts", "probabilities"), [([1, 2], [1.0]), ([], []), ([-1, 2], [0.5, 0.5]), ([1, 2], [0.5, 0.6])]
)
def test_counts_that_do_not_fit_are_refused(counts: list, probabilities: list) -> None:
    with pytest.raises(ValueError, match="must"):
        chi_square(counts, probabilities)


def test_nan_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match="must"):
        chi_square([1, 2], [math.nan, 0.5])


@pytest.mark.parametrize("size", [3, 40, 2000])
def test_fair_draws_are_rejected_no_more_often_than_declared(size: int) -> None:
    random = np.random.default_rng(size)
    probabilities = random.dirichlet(np.full(size, 0.3))
    values = [chi_square(random.multinomial(1000, probabilities), probabilities).p_value for _ in range(2000)]
    # Three standard errors of 2000 repetitions are 0.015 and 0.0067.
    assert np.mean(np.array(values) < 0.05) < 0.075
    assert np.mean(np.array(values) < 0.01) < 0.02


def test_a_wrong_temperature_is_seen_in_a_thousand_draws() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, 50)

    def softmax(temperature: float) -> np.ndarray:
        weights = np.exp(logits / temperature - (logits / temperature).max())
        return weights / weights.sum()

    drawn = random.multinomial(1000, softmax(1.0))
    assert chi_square(drawn, softmax(1.0)).p_value > 1e-3
    assert chi_square(drawn, softmax(0.8)).p_value < 1e-4


def test_holm_has_the_published_values() -> None:
    # Holm's procedure on 0.01, 0.04, 0.03, 0.005, as in the article on it in Wikipedia.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_broken_test_rejects() -> None:
    assert holm([math.nan, 0.5])[0] == 0.0


def test_a_family_of_tests_keeps_the_declared_rate() -> None:
    random = np.random.default_rng(5)
    alarms = [min(holm(random.uniform(size=12).tolist())) < 0.05 for _ in range(4000)]
    assert 0.03 < np.mean(alarms) < 0.06
