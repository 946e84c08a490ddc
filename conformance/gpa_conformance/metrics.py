"""How far logits are from the reference's, per position and in float64.

`LogitsComparison` takes blocks of reference rows with the engine's rows at the same positions, in one pass, row by row;
it keeps some numbers per position. `LogitsMetrics.summary` gives the names that limits and reports use:

    positions, non_finite         scored positions; NaN and infinite logits among all of theirs
    rel_l2, rel_l2_max            ||x - ref|| / ||ref||, over all positions together and at the worst
    cosine, cosine_min            over all positions together and at the worst
    top1, top1_matches            share and count of positions whose highest logit is the reference's; ties: lowest id
    top5, top5_min                ids that the two best fives share, 0 to 5: mean and worst
    kl_{mean,p99,max}             KL(ref || x) of the softmax over the vocabulary, nats
    regret_{mean,max}             log p_ref(the reference's best) - log p_ref(x's best), nats; 0 where they agree
    kl_allowed_*                  as kl, over the ids that the task's answer can hold; only where it restricts them
    regret_allowed_*              as regret, likewise
    delta_logp_max                largest |log p_x - log p_ref| of any id
    norm_ratio_{min,max}          ||x|| / ||ref|| of a position
    scale_{min,max}               slope of x over ref, both centred (least squares)
    scale_error_max               largest |slope - 1|
    offset_{mean,max}             mean(x) - mean(ref), which softmax cannot see: mean, and largest magnitude
    residual                      what is left of rel_l2 when each position's best scale and offset are taken out

A row with a NaN or an infinity is wrong by every metric: its values are NaN, its top-1 is missed, its top-5 is 0, and a
mean or maximum over it is NaN; a limit is never met by NaN.

Of `TopRows`, top1, top5, offset, norm ratio and the regret of an id that is kept are exact; the regret of one that is
not is at least what is given, and so is delta_logp; rel_l2, cosine, scale, residual and KL are estimates whose part
over the top is exact and whose rest comes from the sample (some 10 % off; exact for a mere scale or shift). `inexact`
says which.

KL is summed as p (e^u - 1 - u) with u = log q - log p: equal to the sum of -p u, but no term is negative, so that
nothing cancels in float64 and a sample of the terms estimates it well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gpa_conformance.reference_rows import (
    FullRows,
    ReferenceRows,
    Top,
    TopRows,
    best_ids,
    log_sum_exp,
    stratified,
)

Float64 = NDArray[np.float64]
Ids = NDArray[np.int64]
Exactness = Literal["estimate", "at least"]

INEXACT: Mapping[str, Exactness] = {
    **dict.fromkeys(("rel_l2", "cosine", "kl", "kl_allowed", "scale", "residual"), "estimate"),
    **dict.fromkeys(("regret", "regret_allowed", "delta_logp"), "at least"),
}
"""What is not exact where the baseline holds only the top of each row."""

SERIES = (
    *("rel_l2", "cosine", "top1", "top5", "kl", "regret", "kl_allowed", "regret_allowed", "delta_logp", "margin"),
    *("norm_ratio", "scale", "offset", "residual", "normaliser", "reference_normaliser", "total", "minimum"),
    *("reference_norm", "cosine_previous", "cosine_next"),
)
"""Every number of a position. Beyond those of the summary: margin, the reference's highest logit less its second;
normaliser, log-sum-exp of x (0 for log-probabilities), and the reference's; total and minimum of x's row;
reference_norm, ||ref||; cosine with the reference's row one position before and after (NaN where it is not at hand)."""

BY_POSITION = ("rel_l2", "kl", "kl_allowed", "regret", "regret_allowed", "margin", "scale", "offset", "top1", "top5")
"""Series that are worth a plot."""


@dataclass(frozen=True, slots=True)
class LogitsMetrics:
    """The comparison of some prompts. positions: int64[P]. series: float64[P] by the names of `SERIES`.

    non_finite: int64[P], NaN and infinite logits of each position. inexact: what is not exact, and how.
    """

    positions: Ids
    non_finite: Ids
    series: Mapping[str, Float64]
    inexact: Mapping[str, Exactness]

    def summary(self) -> dict[str, float]:
        """One number per metric, by the names of this module's docstring; empty without positions."""
        if not len(self.positions):
            return {}
        of = self.series
        weight = np.square(of["reference_norm"])
        error2, size2 = np.square(of["rel_l2"]) * weight, np.square(of["norm_ratio"]) * weight
        dot = of["cosine"] * of["norm_ratio"] * weight
        summary = {
            "positions": float(len(self.positions)),
            "non_finite": float(self.non_finite.sum()),
            "rel_l2": float(np.sqrt(error2.sum() / weight.sum())),
            "rel_l2_max": _max(of["rel_l2"]),
            "cosine": float(dot.sum() / np.sqrt(weight.sum() * size2.sum())),
            "cosine_min": float(of["cosine"].min()),
            "top1": float(of["top1"].mean()),
            "top1_matches": float(of["top1"].sum()),
            "top5": float(of["top5"].mean()),
            "top5_min": float(of["top5"].min()),
            **_spread("kl", of["kl"]),
            "regret_mean": float(of["regret"].mean()),
            "regret_max": _max(of["regret"]),
        }
        restricted = of["kl_allowed"] != UNRESTRICTED
        if restricted.any():
            summary |= _spread("kl_allowed", of["kl_allowed"][restricted])
            summary["regret_allowed_mean"] = float(of["regret_allowed"][restricted].mean())
            summary["regret_allowed_max"] = _max(of["regret_allowed"][restricted])
        return summary | {
            "delta_logp_max": _max(of["delta_logp"]),
            "norm_ratio_min": float(of["norm_ratio"].min()),
            "norm_ratio_max": _max(of["norm_ratio"]),
            "scale_min": float(of["scale"].min()),
            "scale_max": _max(of["scale"]),
            "scale_error_max": _max(np.abs(of["scale"] - 1)),
            "offset_mean": float(of["offset"].mean()),
            "offset_max": _max(np.abs(of["offset"])),
            "residual": float(np.sqrt((np.square(of["residual"]) * weight).sum() / weight.sum())),
        }

    def by_position(self) -> dict[str, list[float]]:
        """Positions and the series that are worth a plot, as lists of one length."""
        restricted = bool((self.series["kl_allowed"] != UNRESTRICTED).any())
        names = [name for name in BY_POSITION if restricted or not name.endswith("_allowed")]
        return {"position": self.positions.astype(float).tolist()} | {
            name: self.series[name].tolist() for name in names
        }


UNRESTRICTED = -1.0
"""Value of kl_allowed and regret_allowed where the answer is not restricted; a NaN there must stay an error."""


def merge(parts: Iterable[LogitsMetrics]) -> LogitsMetrics:
    """The comparisons of several prompts as one."""
    parts = list(parts)
    inexact: dict[str, Exactness] = {name: how for part in parts for name, how in part.inexact.items()}
    if not parts:
        return LogitsComparison(None).result()
    return LogitsMetrics(
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.non_finite for part in parts]),
        {name: np.concatenate([part.series[name] for part in parts]) for name in SERIES},
        inexact,
    )


class LogitsComparison:
    """Compares block by block. candidates: int64[R], ascending, the ids that the answer can hold, or None for all."""

    def __init__(self, candidates: Ids | None) -> None:
        self._candidates = candidates
        self._positions: list[int] = []
        self._non_finite: list[int] = []
        self._rows: list[dict[str, float]] = []
        self._inexact: Mapping[str, Exactness] = {}
        self._previous: tuple[int, Float64, Float64] | None = None

    def add(self, reference: ReferenceRows, logits: NDArray[np.floating]) -> None:
        """logits: [n, V], the engine's rows at `reference.positions`. Raises ValueError for another shape."""
        count = len(reference.positions)
        if logits.ndim != 2 or len(logits) != count:
            raise ValueError(f"logits are {list(logits.shape)}; expected {count} rows, one per position of the block")
        if isinstance(reference, FullRows) and logits.shape[1] != reference.logits.shape[1]:
            raise ValueError(f"logits have {logits.shape[1]} columns, the reference's {reference.logits.shape[1]}")
        if isinstance(reference, TopRows):
            self._inexact = INEXACT
        for index, position in enumerate(reference.positions.tolist()):
            x = logits[index].astype(np.float64)
            bad = int(len(x) - np.isfinite(x).sum())
            self._positions.append(position)
            self._non_finite.append(bad)
            self._rows.append(self._row(reference, index, x) if not bad else dict(_WRONG))
            if isinstance(reference, FullRows) and not bad:
                self._neighbours(position, reference.logits[index].astype(np.float64), x)

    def result(self) -> LogitsMetrics:
        """Everything that was added so far."""
        series = {name: np.asarray([row.get(name, np.nan) for row in self._rows], np.float64) for name in SERIES}
        positions, non_finite = (np.asarray(each, np.int64) for each in (self._positions, self._non_finite))
        return LogitsMetrics(positions, non_finite, series, self._inexact)

    def _row(self, reference: ReferenceRows, index: int, x: Float64) -> dict[str, float]:
        common = {"normaliser": log_sum_exp(x), "total": float(x.sum()), "minimum": float(x.min())}
        restricted = {"kl_allowed": UNRESTRICTED, "regret_allowed": UNRESTRICTED}
        if isinstance(reference, FullRows):
            ref = reference.logits[index].astype(np.float64)
            if self._candidates is not None:
                chosen = _softmax(ref[self._candidates], x[self._candidates])
                restricted = {"kl_allowed": chosen["kl"], "regret_allowed": chosen["regret"]}
            return _size(ref, x) | _softmax(ref, x) | _best(best_ids(ref, 5), x) | common | restricted
        if reference.allowed is not None and self._candidates is not None:
            chosen = _top_softmax(reference.allowed, index, x, self._candidates)
            restricted = {"kl_allowed": chosen["kl"], "regret_allowed": chosen["regret"]}
        return (
            _top_size(reference, index, x)
            | _top_softmax(reference.top, index, x, None)
            | _best(reference.top.ids[index, :5], x)
            | common
            | restricted
        )

    def _neighbours(self, position: int, ref: Float64, x: Float64) -> None:
        if self._previous is not None and self._previous[0] == position - 1:
            _, ref_before, x_before = self._previous
            self._rows[-1]["cosine_previous"] = _cosine(ref_before, x)
            self._rows[-2]["cosine_next"] = _cosine(ref, x_before)
        self._previous = (position, ref, x)


_WRONG = dict.fromkeys(SERIES, np.nan) | {"top1": 0.0, "top5": 0.0}
"""A row with a NaN or an infinity."""


def _size(ref: Float64, x: Float64) -> dict[str, float]:
    """What a row's vectors have in common, whatever softmax makes of them."""
    weights = np.ones(1)
    return _sums(ref, x, weights, ref.mean(), x.mean()) | _norms(float(np.sqrt(ref @ ref)), x)


def _top_size(rows: TopRows, index: int, x: Float64) -> dict[str, float]:
    ids, ref, weights = stratified(rows.top, index)
    return _sums(ref, x[ids], weights, float(rows.mean[index]), x.mean()) | _norms(float(rows.norm[index]), x)


def _norms(norm: float, x: Float64) -> dict[str, float]:
    return {"reference_norm": norm, "norm_ratio": _ratio(float(np.sqrt(x @ x)), norm)}


def _sums(ref: Float64, x: Float64, weights: Float64, ref_mean: float, x_mean: float) -> dict[str, float]:
    """Ratios of (weighted) sums over ids; the means are those of the whole rows."""
    offset = x_mean - ref_mean
    error = x - ref
    centred, centred_error = ref - ref_mean, error - offset
    weighted = weights * centred
    slope = _ratio(float((weighted * centred_error).sum()), float((weighted * centred).sum()))
    rest = centred_error - slope * centred
    size2 = float((weights * ref * ref).sum())
    return {
        "rel_l2": float(np.sqrt(_ratio(float((weights * error * error).sum()), size2))),
        "cosine": _ratio(float((weights * ref * x).sum()), float(np.sqrt(size2 * (weights * x * x).sum()))),
        "scale": 1 + slope,
        "offset": offset,
        "residual": float(np.sqrt(_ratio(float((weights * rest * rest).sum()), size2))),
    }


def _softmax(ref: Float64, x: Float64) -> dict[str, float]:
    ref_normaliser, normaliser = log_sum_exp(ref), log_sum_exp(x)
    log_p = ref - ref_normaliser
    delta = (x - normaliser) - log_p
    best, chosen = int(ref.argmax()), int(x.argmax())
    with np.errstate(over="ignore"):
        kl = float((np.exp(log_p) * (np.expm1(delta) - delta)).sum())
    second = np.partition(ref, len(ref) - 2)[-2] if len(ref) > 1 else -np.inf
    return {
        "kl": kl,
        "regret": float(ref[best] - ref[chosen]),
        "delta_logp": float(np.abs(delta).max()),
        "margin": float(ref[best] - second),
        "reference_normaliser": ref_normaliser,
    }


def _top_softmax(top: Top, index: int, x: Float64, candidates: Ids | None) -> dict[str, float]:
    ref_normaliser = float(top.log_normaliser[index])
    possible = x if candidates is None else x[candidates]
    ids, ref, weights = stratified(top, index)
    log_p = ref - ref_normaliser
    delta = (x[ids] - log_sum_exp(possible)) - log_p
    with np.errstate(over="ignore"):
        kl = float((weights * np.exp(log_p) * (np.expm1(delta) - delta)).sum())
    best = int(possible.argmax())
    chosen = best if candidates is None else int(candidates[best])
    known = np.flatnonzero(ids == chosen)
    lowest = float(top.logits[index, -1])
    row = top.logits[index].astype(np.float64)
    return {
        "kl": kl,
        "regret": float(row[0] - (ref[known[0]] if len(known) else lowest)),
        "delta_logp": float(np.abs(delta).max()),
        "margin": float(row[0] - row[1]) if len(row) > 1 else np.inf,
        "reference_normaliser": ref_normaliser,
    }


def _best(best: Ids, x: Float64) -> dict[str, float]:
    own = best_ids(x, 5)
    return {"top1": float(own[0] == best[0]), "top5": float(len(np.intersect1d(own, best)))}


def _cosine(a: Float64, b: Float64) -> float:
    return _ratio(float(a @ b), float(np.sqrt((a @ a) * (b @ b))))


def _ratio(numerator: float, denominator: float) -> float:
    """A quotient in which 0 / 0 is 0 and anything else over 0 infinite; NaN stays NaN."""
    if denominator == 0:
        return 0.0 if numerator == 0 else float(np.copysign(np.inf, numerator)) if numerator == numerator else np.nan
    return numerator / denominator


def _max(values: Sequence[float] | Float64) -> float:
    """NumPy's maximum is NaN where any value is."""
    return float(np.max(values))


def _spread(name: str, values: Float64) -> dict[str, float]:
    p99 = float(np.quantile(values, 0.99, method="higher")) if not np.isnan(values).any() else np.nan
    return {f"{name}_mean": float(values.mean()), f"{name}_p99": p99, f"{name}_max": _max(values)}
