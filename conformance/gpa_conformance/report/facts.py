"""What every form of the report says: the verdict, the check that decided a case, what moved, what was scored.

Nothing here renders; all functions are pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpa_conformance.limits import METRICS
from gpa_conformance.results import CaseResult, Check, RunReport, Status
from gpa_conformance.statistics import what_it_proves

STATE_WORDS: dict[Status, str] = {
    "passed": "passed",
    "failed": "FAILED",
    "error": "ERROR",
    "skipped": "skipped",
    "known-failure": "known failure",
    "unexpected-pass": "unexpected pass",
}

STATE_SIGNS: dict[Status, str] = {
    "passed": "✓",
    "failed": "✗",
    "error": "!",
    "skipped": "–",
    "known-failure": "k",
    "unexpected-pass": "u",
}

COMPARED = ("logits", "long")
"""Families whose prompts are compared with the baseline position by position."""

_PERCENT = frozenset(
    (
        *("rel_l2", "rel_l2_max", "residual", "top1"),
        *("stt_wer_low", "recogniser_wer_excess_low", "own_wer_excess_low", "baseline_wer_excess_low"),
        *("f0_share_high", "f0_share", "duration_off", "wer", "recogniser_wer", "recogniser_wer_natural"),
        *("own_wer", "own_wer_natural", "baseline_wer", "equal_answers"),
    )
)
_NATS = ("kl_", "regret_", "delta_logp_")
_UNITS = {"top5": "of 5", "top5_min": "of 5", "snr_db": "dB", "seconds": "s"}
_SHARES = frozenset(
    (
        *("cosine", "cosine_min", "top1", "f0_share_high"),
        *("semantic_agreement", "voice_agreement", "glm_agreement"),
    )
)
_HOLDS: dict[str, str] = {"<=": "≤", ">=": "≥", "==": "="}
_BREAKS: dict[str, str] = {"<=": ">", ">=": "<", "==": "≠"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The whole run in a sentence. notes: what a reader of a green report must know, too."""

    passed: bool
    sentence: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A limit over a run: the check that used most of it, the case of that check, and how many cases it judged."""

    worst: Check
    case: CaseResult
    cases: int


def verdict(report: RunReport) -> Verdict:
    """What the run proves, or not: passed only where the exit code is 0."""
    engine = (
        f"{report.engine.get('backend', '?')} {report.engine.get('dtype', '?')} on {report.engine.get('device', '?')}"
    )
    ran = sum(case.ran for case in report.cases)
    notes = []
    if report.skipped:
        notes.append(f"{count(report.skipped, 'case')} skipped: nothing is known about what they test")
    if report.unreached:
        notes.append(f"{count(report.unreached, 'case')} had not ended when the run was interrupted")
    if report.known:
        notes.append(f"{count(report.known, 'known failure')}, as the known-failures file says")
    if surprises := report.count("unexpected-pass"):
        notes.append(
            f"{count(surprises, 'case')} passed although the known-failures file lists them: remove them there"
        )
    if report.failed:
        sentence = f"{engine} is not the same model: {report.failed} of the {count(ran, 'case')} that ran failed"
    elif report.unreached:
        sentence = (
            f"{engine}: nothing is proven, the run was interrupted after {count(ran, 'case')} ({report.passed} passed)"
        )
    elif not report.passed:
        sentence = f"{engine}: nothing is proven, no case passed"
    else:
        sentence = f"{engine} is the same model as far as this run can see: {report.passed} of {ran} cases passed"
        if report.passed == ran:
            those = f"all {ran} cases" if ran > 1 else "the one case"
            sentence = f"{engine} is the same model as far as this run can see: {those} that ran passed"
    return Verdict(report.exit_code == 0, sentence, tuple(notes))


def decisive(case: CaseResult) -> Check | None:
    """The check that decided the case: the failed one furthest beyond its limit, else the one nearest to its limit."""
    # Of figures that use as much, a measured one says more than a count of nothing.
    return max(case.failed_checks or case.checks, key=lambda check: (used(check), check.relation != "=="), default=None)


def used(check: Check) -> float:
    """How much of its limit a value uses: 1 is at the limit, above is beyond; infinite for NaN and a broken zero."""
    value, limit = check.value, check.limit
    if not math.isfinite(value):
        return 0.0 if check.passed else math.inf
    if check.relation == "==" or (limit == 0 and check.relation == "<="):
        return 0.0 if check.passed else math.inf
    if check.relation == "<=":
        return value / limit
    if check.metric in _SHARES and limit < 1:
        return (1 - value) / (1 - limit)
    return limit / value if value > 0 else math.inf


def show_check(check: Check) -> str:
    """ "rel_l2 1.24 % ≤ 3 %", or "rel_l2 50 % > 3 %" where it fails: the value and its limit in the metric's unit."""
    relation = _HOLDS[check.relation] if check.passed or math.isnan(check.value) else _BREAKS[check.relation]
    sign = f"is not {relation}" if math.isnan(check.value) else relation
    return f"{check.metric} {show_value(check.metric, check.value)} {sign} {show_value(check.metric, check.limit)}"


def show_limit(check: Check) -> str:
    """ "≤ 3 %"."""
    return f"{_HOLDS[check.relation]} {show_value(check.metric, check.limit)}"


def show_value(metric: str, value: float) -> str:
    """A metric's value with its unit: "1.24 %", "3.1e-05 nats", "4.6 of 5"."""
    if metric in _PERCENT:
        return f"{number(100 * value)} %"
    unit = "nats" if metric.startswith(_NATS) else _UNITS.get(metric, "")
    return f"{number(value)} {unit}".rstrip()


def number(value: float) -> str:
    """Four significant digits, more where a share just below 1 or 100 % would be rounded up to it."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return next(
        text for digits in range(4, 18) if float(text := f"{value:.{digits}g}") not in (1, 100) or float(text) == value
    )


def count(amount: int, thing: str) -> str:
    """ "1 case", "3 cases"."""
    return f"{amount} {thing}" if amount == 1 else f"{amount} {thing}s"


def duration(seconds: float) -> str:
    """ "8.3 s" or "2 min 5 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {round(seconds % 60)} s"


def scored(report: RunReport) -> tuple[int, int]:
    """(positions, top-1 matches) of all prompts that were compared with the baseline."""
    cases = [case for case in report.cases if case.family in COMPARED and "top1_matches" in case.metrics]
    positions, matches = (int(sum(case.metrics[name] for case in cases)) for name in ("positions", "top1_matches"))
    return positions, matches


def proof(report: RunReport) -> str:
    """What the top-1 count of the run shows, in words."""
    positions, matches = scored(report)
    if not positions:
        return "no position was scored against the baseline: the run says nothing about the logits"
    return f"top-1 agreement {what_it_proves(matches, positions)}"


def limited(report: RunReport) -> list[Figure]:
    """A line per limit of the limits file that was applied: the worst value, and where the limit comes from."""
    groups: dict[tuple[str, str, float, str], list[tuple[Check, CaseResult]]] = {}
    for case in report.cases:
        for check in case.checks:
            if check.metric in METRICS:
                key = (check.metric, check.relation, check.limit, check.source)
                groups.setdefault(key, []).append((check, case))
    return [Figure(*max(group, key=lambda each: used(each[0])), len(group)) for group in groups.values()]


def identity(report: RunReport) -> list[tuple[str, str]]:
    """What was tested against what, in (name, value) lines."""
    engine = report.engine
    capabilities = engine.get("capabilities") or ["none"]
    options = engine.get("options") or {}
    lines = [
        ("engine", f"{report.target}{_in_brackets(engine.get('note', ''))}"),
        ("device, dtype", f"{engine.get('device', '?')}, {engine.get('dtype', '?')}"),
        ("vocabulary, context", f"{engine.get('vocab_size', '?')} ids, {engine.get('max_context', '?')} positions"),
        ("capabilities", ", ".join(sorted(map(str, capabilities)))),
        ("options", ", ".join(f"{key}={value}" for key, value in options.items()) or "none"),
        ("model", str(report.model.get("name", "?"))),
        ("speech", str(report.model.get("speech", ""))),
        ("baseline", f"{report.baseline.get('path', 'none')}, by {report.baseline.get('made_by', '?')}"),
        ("started", f"{report.started}, took {duration(report.seconds)}"),
    ]
    return [(name, value) for name, value in lines if value]


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""
