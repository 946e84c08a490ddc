"""What counts and draws prove: bounds for a share and a ratio, a test of draws against probabilities, corrections.

The declared false-alarm rate of a family of tests is the probability that a healthy engine fails any of them. Holm's
correction keeps it at or below its `rate` for any dependence between the tests; with the chi-square approximation at
expected counts of five and more it is an approximate bound, which the suite's own tests check over many seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MINIMUM_EXPECTED = 5.0
"""Draws that a bin must expect for the chi-square approximation (Cochran 1954)."""

RESAMPLES = 4000
TAIL = 0.025
"""Of the bootstrap: draws, and what lies beyond each end of an interval."""


@dataclass(frozen=True, slots=True)
class ChiSquare:
    """A goodness-of-fit test. bins: after merging. impossible: draws of outcomes of probability 0 (then p is 0)."""

    statistic: float
    degrees: int
    p_value: float
    bins: int
    draws: int
    impossible: int


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share (Clopper and Pearson 1934). Raises ValueError for impossible counts."""
    tail = (1 - _checked(successes, trials, confidence)) / 2
    return _lower(successes, trials, tail), 1 - _lower(trials - successes, trials, tail)


def lower_bound(successes: int, trials: int, confidence: float = 0.95) -> float:
    """The share that the counts show to be exceeded, one-sided: 8 of 8 show more than 68.8 % at 95 %."""
    return _lower(successes, trials, 1 - _checked(successes, trials, confidence))


def trials_without_a_miss(share: float, confidence: float = 0.95) -> int:
    """Trials that must all succeed to show that more than `share` do: 299 for 99 % at 95 %."""
    if not (0 < share < 1 and 0 < confidence < 1):
        raise ValueError(f"share {share} and confidence {confidence} must lie between 0 and 1")
    needed = max(1, math.ceil(math.log(1 - confidence) / math.log(share) - 1e-9))
    return needed if _lower(needed, needed, 1 - confidence) > share else needed + 1


def what_it_proves(successes: int, trials: int, confidence: float = 0.95, claim: float = 0.99) -> str:
    """The count in words, with what the claimed share would need."""
    level = f"{100 * confidence:g}% confidence"
    if trials == 0:
        return "0/0 shows nothing"
    bound = lower_bound(successes, trials, confidence)
    if bound > claim:
        return f"{successes}/{trials} shows > {_percent(bound, 1.0)} at {level}"
    needed = trials_without_a_miss(claim, confidence)
    return (
        f"{successes}/{trials} shows only > {_percent(bound, claim)} at {level}; "
        f"> {100 * claim:g}% needs {needed} positions without a miss"
    )


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, and the ends of its interval at 95 % confidence."""

    value: float
    low: float
    high: float


def share(successes: int, trials: int) -> Interval:
    """A share of independent trials with its exact interval; of no trials NaN."""
    if trials == 0:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(successes / trials, *clopper_pearson(successes, trials))


def bootstrap_ratio(
    amounts: Sequence[float] | NDArray, sizes: Sequence[float] | NDArray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """sum(amounts) / sum(sizes) of units that are drawn together, e.g. errors and words of utterances: float64[N] both.

    The interval is that of the ratio over `resamples` draws of N units with replacement (Efron and Tibshirani 1993, the
    percentile method), the same for the same seed; of no units NaN. For differences of two measurements of the same
    units, amounts are the differences.
    """
    amounts, sizes = np.asarray(amounts, np.float64), np.asarray(sizes, np.float64)
    if amounts.shape != sizes.shape or amounts.ndim != 1 or not (sizes > 0).all():
        raise ValueError(f"amounts {amounts.shape} and sizes {sizes.shape} must be two equal rows, sizes above 0")
    if not len(sizes):
        return Interval(math.nan, math.nan, math.nan)
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(resamples, len(sizes)))
    low, high = np.quantile(amounts[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [TAIL, 1 - TAIL])
    return Interval(float(amounts.sum() / sizes.sum()), float(low), float(high))


def error_rate(errors: Sequence[int], words: Sequence[int]) -> Interval:
    """Errors per word with the bootstrap interval over utterances.

    Where there is no error a bootstrap finds no doubt; the upper end is then that of no error in so many words.
    """
    found = bootstrap_ratio(errors, words)
    if len(words) and not any(errors):
        return Interval(0.0, 0.0, clopper_pearson(0, int(sum(words)))[1])
    return found


def chi_square(counts: Sequence[int] | NDArray, probabilities: Sequence[float] | NDArray) -> ChiSquare:
    """Are `counts` draws from `probabilities`? Rare outcomes are merged until every bin expects five draws.

    counts: integers [R]. probabilities: float64[R], summing to 1. A draw of probability 0 gives p 0. Fewer than two
    bins decide nothing: p is 1. Raises ValueError for arrays that do not fit. Pearson's test (1900).
    """
    observed, expected = np.asarray(counts, np.float64), np.asarray(probabilities, np.float64)
    if observed.shape != expected.shape or observed.ndim != 1 or not len(observed):
        raise ValueError(f"counts {observed.shape} and probabilities {expected.shape} must be two equal rows")
    if not (np.all(observed >= 0) and np.all(expected >= 0) and abs(expected.sum() - 1) < 1e-6):
        raise ValueError("counts must not be negative and probabilities must sum to 1")
    draws = int(observed.sum())
    impossible = int(observed[expected == 0].sum())
    observed, expected = _merged(observed[expected > 0], expected[expected > 0] * draws)
    statistic = float((np.square(observed - expected) / expected).sum())
    degrees = len(expected) - 1
    p_value = 0.0 if impossible else chi_square_tail(statistic, degrees) if degrees else 1.0
    return ChiSquare(statistic, degrees, p_value, len(expected), draws, impossible)


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(X > statistic) of the chi-square distribution: Q(degrees / 2, statistic / 2)."""
    return upper_gamma(degrees / 2, statistic / 2)


def upper_gamma(a: float, x: float) -> float:
    """The regularised upper incomplete gamma function Q(a, x) for a > 0, x >= 0 (Numerical Recipes, chapter 6.2).

    The series of P below a + 1, Lentz's continued fraction of Q above.
    """
    if not (a > 0 and x >= 0):
        raise ValueError(f"Q({a}, {x}) needs a above 0 and x of at least 0")
    if x == 0:
        return 1.0
    if math.isinf(x):
        return 0.0
    front = math.exp(-x + a * math.log(x) - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        n = a
        while abs(term) > abs(total) * 1e-16:
            n += 1
            term *= x / n
            total += term
        return max(0.0, 1 - total * front)
    tiny = 1e-300
    b = x + 1 - a
    c, d = 1 / tiny, 1 / b
    fraction = d
    for i in range(1, 100_000):
        factor = -i * (i - a)
        b += 2
        d = factor * d + b
        c = b + factor / c
        d, c = 1 / (d if d else tiny), c or tiny
        fraction *= d * c
        if abs(d * c - 1) < 1e-16:
            break
    return min(1.0, front * fraction)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests (Holm 1979), in the order given; those at or below the rate are rejected.

    A NaN is the outcome of a broken test and counts as 0.
    """
    safe = [0.0 if math.isnan(p) else float(p) for p in p_values]
    adjusted = [0.0] * len(safe)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(safe)), key=safe.__getitem__)):
        highest = max(highest, min(1.0, (len(safe) - rank) * safe[index]))
        adjusted[index] = highest
    return adjusted


def _merged(observed: NDArray[np.float64], expected: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """All outcomes that expect too little in one bin, and the next rarest ones until it expects enough."""
    order = np.argsort(expected, kind="stable")
    sums = np.cumsum(expected[order])
    rare = int((expected < MINIMUM_EXPECTED).sum())
    while 0 < rare < len(order) and sums[rare - 1] < MINIMUM_EXPECTED:
        rare += 1
    if rare == 0:
        return observed, expected
    kept, merged = order[rare:], order[:rare]
    return (
        np.append(observed[kept], observed[merged].sum()),
        np.append(expected[kept], expected[merged].sum()),
    )


def _checked(successes: int, trials: int, confidence: float) -> float:
    if not 0 <= successes <= trials or trials < 1 or not 0 < confidence < 1:
        raise ValueError(f"{successes} of {trials} at confidence {confidence} is not a count")
    return confidence


def _lower(successes: int, trials: int, tail: float) -> float:
    """The share at which `successes` or more have the probability `tail`; found by bisection."""
    if successes == 0:
        return 0.0
    if successes == trials:
        return tail ** (1 / trials)
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if _at_least(successes, trials, middle) < tail:
            low = middle
        else:
            high = middle
    return low


def _at_least(successes: int, trials: int, share: float) -> float:
    """P(X >= successes) of the binomial distribution, summed over the shorter side."""
    if share <= 0 or share >= 1:
        return float(share >= 1)
    counts = np.arange(successes, trials + 1) if trials - successes < successes else np.arange(successes)
    log_choose = np.array([math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in counts])
    mass = float(np.exp(log_choose + counts * math.log(share) + (trials - counts) * math.log1p(-share)).sum())
    return mass if len(counts) and counts[0] == successes else 1 - mass


def _percent(share: float, claim: float) -> str:
    """Rounded, but never up to a claim that the count does not show."""
    rounded = round(1000 * share) / 10
    return f"{rounded:.1f}%" if rounded < 100 * claim else f"{math.floor(1000 * share) / 10:.1f}%"
