"""What a comparison smells like, in words: which metric moved, and what usually moves it so.

These are hints for whoever looks for the fault, never a verdict: limits decide, and two faults may look alike. Each
hint names the figures that it rests on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gpa_conformance.limits import DtypeLimits
from gpa_conformance.metrics import LogitsMetrics

ROUNDING = 1e-4
"""rel-L2 that is never worth a hint when no limits are given: float32's."""


class _Facts(NamedTuple):
    """Medians over the finite positions; `allowed` is the rel-L2 that the dtype may have."""

    metrics: LogitsMetrics
    finite: np.ndarray
    allowed: float
    rel_l2: float
    residual: float
    scale: float
    scale_spread: float
    offset: float
    offset_spread: float
    size: float


def diagnose(metrics: LogitsMetrics, limits: DtypeLimits | None = None) -> list[str]:
    """Hints, the most telling first; empty when the rel-L2 of every position is within what the dtype allows."""
    hints = _non_finite(metrics)
    finite = metrics.non_finite == 0
    if not finite.any():
        return hints
    facts = _facts(metrics, finite, limits)
    if facts.rel_l2 <= facts.allowed and np.nanmax(metrics.series["rel_l2"][finite]) <= 3 * facts.allowed:
        return hints
    explained = next((hint for form in _FORMS if (hint := form(facts)) is not None), None)
    if explained is not None:
        return [*hints, explained]
    return [*hints, *filter(None, (kind(facts) for kind in _KINDS))]


def _facts(metrics: LogitsMetrics, finite: np.ndarray, limits: DtypeLimits | None) -> _Facts:
    of = {name: values[finite] for name, values in metrics.series.items()}
    allowed = limits["rel_l2"].value if limits is not None and "rel_l2" in limits else ROUNDING
    return _Facts(
        metrics=metrics,
        finite=finite,
        allowed=allowed,
        rel_l2=float(np.median(of["rel_l2"])),
        residual=float(np.median(of["residual"])),
        scale=float(np.median(of["scale"])),
        scale_spread=float(np.ptp(of["scale"])),
        offset=float(np.median(of["offset"])),
        offset_spread=float(np.ptp(of["offset"])),
        size=float(np.median(of["reference_norm"])),
    )


def _non_finite(metrics: LogitsMetrics) -> list[str]:
    bad = metrics.non_finite > 0
    if not bad.any():
        return []
    first = int(metrics.positions[bad].min())
    count, values = int(bad.sum()), int(metrics.non_finite.sum())
    where = "every position" if bad.all() else f"{count} of {len(bad)} positions, the first at {first}"
    return [
        f"non_finite: {values} NaN or infinite logits at {where}: an overflow, a division by 0, or memory not written"
    ]


def _probabilities(facts: _Facts) -> str | None:
    totals, lowest = (facts.metrics.series[name][facts.finite] for name in ("total", "minimum"))
    if (lowest >= 0).all() and (np.abs(totals - 1) < 0.01).all():
        return "every row is positive and sums to 1: these are probabilities, not logits"
    return None


def _log_probabilities(facts: _Facts) -> str | None:
    own, reference = (facts.metrics.series[name][facts.finite] for name in ("normaliser", "reference_normaliser"))
    # In bfloat16 a log-probability of -12 is off by up to 0.03.
    if np.abs(own).max() < 0.1 and np.abs(reference).min() > 0.5:
        return (
            f"offset: mean {facts.offset:.4g}, and the log-sum-exp of every row is 0 (of the reference's "
            f"{np.median(reference):.3g}): these are log-probabilities, not logits; softmax cannot see the difference"
        )
    return None


def _affine(facts: _Facts) -> str | None:
    """A scale or a shift explains nearly everything."""
    if not facts.residual <= max(facts.allowed, 0.05 * facts.rel_l2):
        return None
    scaled = abs(facts.scale - 1) > max(3 * facts.allowed, 0.5 * facts.rel_l2)
    hints = []
    if scaled:
        same = facts.scale_spread <= max(10 * facts.allowed, 0.05 * abs(facts.scale - 1))
        how = "the same at every position" if same else f"differing by {facts.scale_spread:.2g} between positions"
        hints.append(
            f"scale: the logits are the reference's times {facts.scale:.4g}, {how}, and little else differs "
            f"(residual {facts.residual:.2g}): a temperature or scale on the logits, or a final norm off by a factor"
        )
    if facts.rel_l2**2 > 1.2 * ((facts.scale - 1) ** 2 + facts.residual**2):
        spread = facts.offset_spread
        constant = spread <= 0.05 * abs(facts.offset)
        how = "the same at every position" if constant else f"differing by {spread:.3g} between positions"
        hints.append(
            f"offset: every row is the reference's plus a constant, on average {facts.offset:.4g}, {how}; softmax "
            "cannot see it: normalised logits, or a bias that the model does not have"
        )
    return "; ".join(hints) or None


def _shifted(facts: _Facts) -> str | None:
    """Rows that are the reference's of another position."""
    for name, what, cause in (
        ("cosine_previous", "one position earlier", "the first id is doubled, or the rows are read one too early"),
        ("cosine_next", "one position later", "the rows start one too late, or the first id is lost"),
    ):
        neighbour, own = facts.metrics.series[name][facts.finite], facts.metrics.series["cosine"][facts.finite]
        at_hand = np.isfinite(neighbour)
        if at_hand.any() and np.median(neighbour[at_hand]) > 0.99 and np.median(own[at_hand]) < 0.9:
            cosine = float(np.median(neighbour[at_hand]))
            return f"cosine: the rows are those of the reference {what} (cosine {cosine:.4f}): {cause}"
    return None


def _unrelated(facts: _Facts) -> str | None:
    cosine = float(np.median(facts.metrics.series["cosine"][facts.finite]))
    if abs(cosine) < 0.1:
        return (
            f"cosine: {cosine:.3f}, the rows have nothing in common with the reference's: another output matrix (a "
            "tied embedding ignored), other weights, or ids of another vocabulary"
        )
    return None


def _where(facts: _Facts) -> str | None:
    """Which positions are wrong: 0 as well, from 1 on, or more and more."""
    positions, errors = facts.metrics.positions[facts.finite], facts.metrics.series["rel_l2"][facts.finite]
    at_first, later = errors[positions == 0], errors[positions > 0]
    if not len(at_first):
        return None
    start = float(np.median(at_first))
    if start > facts.allowed and start > 0.1 * facts.rel_l2:
        return (
            f"rel_l2: position 0 is wrong too ({start:.3g}, median {facts.rel_l2:.3g}), where attention sees only "
            "itself and rotary angles cancel: look at the embedding, the norms and their eps, the MLP, the value and "
            "output projections, the head, or the ids that reach the model"
        )
    if not len(later) or not np.median(later) > facts.allowed:
        return None
    order = np.argsort(positions[positions > 0], kind="stable")
    quarter = max(1, len(order) // 4)
    early, late = float(np.median(later[order[:quarter]])), float(np.median(later[order[-quarter:]]))
    trend = (
        f"grows with position ({early:.3g} in the first quarter, {late:.3g} in the last): look at the rotary embedding "
        "(theta, scaling, position ids), then at the mask"
        if late > 1.5 * early
        else f"is about as large early ({early:.3g}) as late ({late:.3g}): look at the attention's scale, its query "
        "and key norms, the pairing of heads, the mask, and the rotary embedding's layout"
    )
    return f"rel_l2: position 0 is right ({start:.3g}), and the error from position 1 on {trend}"


def _from_position(facts: _Facts) -> str | None:
    """A prompt whose start is right and whose rest is wrong."""
    order = np.argsort(facts.metrics.positions[facts.finite], kind="stable")
    positions, wrong = (
        facts.metrics.positions[facts.finite][order],
        facts.metrics.series["rel_l2"][facts.finite][order] > 3 * facts.allowed,
    )
    if len(np.unique(positions)) < len(positions) or not wrong.any():
        return None
    first = int(np.argmax(wrong))
    if first >= 4 and wrong[first:].mean() > 0.9:
        return (
            f"rel_l2: right up to position {positions[first - 1]}, wrong from {positions[first]} on: a seam between "
            "chunks or blocks, an id that is lost or changed there, or a limit of the context"
        )
    if not wrong[:first].any() and wrong[first:].sum() <= max(1, 0.1 * len(wrong)):
        return f"rel_l2: only {int(wrong.sum())} of {len(wrong)} positions are wrong, the first is {positions[first]}"
    return None


def _sampled(facts: _Facts) -> str | None:
    if not facts.metrics.inexact:
        return None
    return "the baseline holds only the top of some rows: " + ", ".join(
        f"{name} is {'at least what is given' if how == 'at least' else 'an estimate'}"
        for name, how in facts.metrics.inexact.items()
    )


_FORMS: tuple[Callable[[_Facts], str | None], ...] = (_probabilities, _log_probabilities, _affine, _shifted)
"""Each explains the whole difference; the first that fits is the only hint."""

_KINDS: tuple[Callable[[_Facts], str | None], ...] = (_unrelated, _from_position, _where, _sampled)
