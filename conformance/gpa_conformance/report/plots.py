"""The plots of a run, as SVG: errors by position, the KL histogram, margin against regret, and those of single cases.

Each returns an SVG element and the words under it, or None where the run has no data for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from gpa_conformance.limits import METRICS
from gpa_conformance.report.facts import COMPARED, count, number, show_check, show_value, used
from gpa_conformance.report.svg import Axis, Chart
from gpa_conformance.results import LONGEST_SERIES, CaseResult, Check, RunReport

LEAST = 1e-9
"""Errors below this are drawn as this: float32 cannot tell them from 0."""

LEAST_KL = 1e-16
LEAST_SHARE = 1e-3
"""Values that use less of their limit are drawn as this."""

BINS_PER_DECADE = 3

ROW = 20
"""Height of a row of dots."""


class Plot(NamedTuple):
    """title, caption: plain text."""

    title: str
    caption: str
    svg: str


def errors_by_position(report: RunReport) -> Plot | None:
    """rel-L2 of every position of every prompt; failed cases are in front."""
    cases = sorted(_with(report, "rel_l2"), key=lambda case: case.failed)
    if not cases:
        return None
    values = [value for case in cases for value in case.series["rel_l2"]]
    end = max(1.0, *(_positions(case)[-1] for case in cases))
    x = (
        Axis.decades("position in the prompt", [1, end], 1, 1e6)
        if end > 1000
        else Axis("position in the prompt", 0, end)
    )
    title = "Error by position"
    worst = max(cases, key=lambda case: _worst(case.series["rel_l2"]))
    told = f"largest: {show_value('rel_l2', _worst(worst.series['rel_l2']))} in {worst.case}"
    chart = Chart(
        title,
        f"rel-L2 of {count(len(values), 'position')} of {count(len(cases), 'prompt')}; {told}.",
        x,
        _error_axis(cases),
    )
    for case in cases:
        _draw_errors(chart, case, "bad" if case.failed else "")
    _draw_limit(chart, cases, "rel_l2_max", "rel_l2")
    failed = [case.case for case in cases if case.failed]
    caption = f"rel-L2 of the logits, one line per prompt ({len(cases)}); {told}."
    if not all(map(math.isfinite, values)):
        caption += " A dot at the upper edge is NaN or infinite."
    return Plot(title, caption + _failed_words(failed), chart.render("errors"))


def kl_histogram(report: RunReport) -> Plot | None:
    """How many positions have which KL divergence."""
    cases = _with(report, "kl")
    values = [value for case in cases for value in case.series["kl"]]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    limit = min((check.limit for case in cases for check in case.checks if check.metric == "kl_max"), default=math.nan)
    x = Axis.decades("KL(baseline ‖ engine), nats", [*finite, *([limit] if limit > 0 else [])], LEAST_KL, 1e3)
    first, last = round(math.log10(x.low)) * BINS_PER_DECADE, round(math.log10(x.high)) * BINS_PER_DECADE
    counts = [0] * (last - first)
    for value in finite:
        place = math.floor(math.log10(max(value, x.low)) * BINS_PER_DECADE + 1e-9) - first
        counts[min(max(place, 0), len(counts) - 1)] += 1
    title = "KL divergence of all positions"
    told = f"{count(len(finite), 'position')}, largest {number(max(finite))} nats"
    chart = Chart(title, f"Histogram of {told}.", x, Axis("positions", 0, max(counts) * 1.12))
    for index, amount in enumerate(counts):
        start, end = (10 ** ((first + index + step) / BINS_PER_DECADE) for step in (0, 1))
        if amount:
            style = "bad" if start >= limit * (1 - 1e-9) else ""
            chart.bar(
                start, end, amount, style, f"{count(amount, 'position')} from {number(start)} to {number(end)} nats"
            )
    if limit > 0:
        chart.upright(limit, f"limit {number(limit)}")
    beyond = sum(value > limit for value in finite)
    caption = f"{told}; {beyond} beyond the limit of {number(limit)} nats." if limit > 0 else f"{told}."
    if len(values) > len(finite):
        caption += f" {count(len(values) - len(finite), 'position')} with NaN or infinite logits cannot be drawn."
    return Plot(title, caption, chart.render("kl"))


def margin_against_regret(report: RunReport) -> Plot | None:
    """What a different choice costs, against how close the reference's choice was."""
    # A shortened series has lost which margin belongs to which regret.
    cases = [case for case in _with(report, "regret", "margin") if len(case.series["regret"]) < LONGEST_SERIES]
    points = [
        (margin, regret, position, case)
        for case in cases
        for margin, regret, position in zip(case.series["margin"], case.series["regret"], _positions(case), strict=True)
        if math.isfinite(margin) and math.isfinite(regret)
    ]
    if not points:
        return None
    limit = min(
        (check.limit for case in cases for check in case.checks if check.metric == "regret_max"), default=math.nan
    )
    limits = [limit] if limit > 0 else []
    regrets = [regret for _, regret, *_ in points if regret > 0]
    x = Axis.decades("margin of the baseline's best over its second, nats", [each[0] for each in points], 1e-5, 1e3)
    y = Axis.decades("regret of the engine's choice, nats", [*regrets, *limits], 1e-6, 1e3)
    title = "Margin against regret"
    told = f"{len(points) - len(regrets)} of {count(len(points), 'position')} agree, {len(regrets)} differ"
    chart = Chart(title, f"{told}.", x, y)
    low, high = max(x.low, y.low), min(x.high, y.high)
    if low < high:
        chart.line([(low, low), (high, high)], "diagonal", "regret = margin: the baseline's second choice")
    if limit > 0:
        chart.level(limit, f"limit {number(limit)}")
    chart.rug([margin for margin, regret, *_ in points if regret <= 0], "", "positions where both choose the same")
    for margin, regret, position, case in points:
        if regret > 0:
            hover = f"{case.case}, position {position:g}: margin {number(margin)}, regret {number(regret)} nats"
            chart.point(margin, regret, "bad" if regret > limit else "", hover)
    caption = (
        f"{told}. Ticks at the bottom agree; a dot is a different choice, on the diagonal the baseline's second best. "
    )
    return Plot(
        title,
        caption + "Near ties (left) differ by rounding alone; a dot above the limit is a fault.",
        chart.render("regret"),
    )


def limits_used(report: RunReport) -> Plot | None:
    """How much of every limit each case uses; 1 is at the limit."""
    rows: dict[str, list[tuple[float, CaseResult, Check]]] = {}
    for case in report.cases:
        for check in case.checks:
            if check.metric in METRICS and check.relation != "==" and (check.limit > 0 or not check.passed):
                rows.setdefault(check.metric, []).append((used(check), case, check))
    if not rows:
        return None
    shares = [share for row in rows.values() for share, *_ in row]
    x = Axis.decades("share of the limit that is used", [*shares, 1.0], LEAST_SHARE, 1e4)
    title = "Room under the limits"
    beyond = sum(share > 1 for share in shares)
    told = f"{count(len(shares), 'figure')} of {count(len(rows), 'limit')}; {beyond} beyond"
    y_axis = Axis("", 0, len(rows), bare=True)
    chart = Chart(title, f"{told}.", x, y_axis, max(62 + ROW * len(rows), 180), left=150)
    for index, (metric, row) in enumerate(rows.items()):
        y = len(rows) - index - 0.5
        chart.row_name(y, metric)
        for share, case, check in row:
            shown = x.high if math.isinf(share) else share
            chart.point(shown, y, "" if check.passed else "bad", f"{case.case}: {show_check(check)}")
    chart.upright(1.0, "limit")
    return Plot(title, f"{told}. One dot per case; left of the line is within the limit.", chart.render("used"))


def case_plot(case: CaseResult, name: str) -> Plot | None:
    """The plot of one case, by what it measured. name: unique in the page."""
    series = case.series
    if "rel_l2" in series:
        positions = _positions(case)
        x = Axis("position in the prompt", 0, max(positions[-1], 1))
        chart = Chart(
            f"{case.case}: error by position", _range_words(series["rel_l2"], "rel_l2"), x, _error_axis([case]), 220
        )
        _draw_errors(chart, case, "bad only" if case.failed else "only")
        _draw_limit(chart, [case], "rel_l2_max", "rel_l2")
        return Plot("Error by position", f"rel-L2; {_range_words(series['rel_l2'], 'rel_l2')}", chart.render(name))
    if "draws_by_rank" in series:
        return _draws(case, name)
    if "prefix_rel_l2" in series:
        at, values = series.get("prefix", []), series["prefix_rel_l2"]
        title, axes = "Last rows of every prefix against the whole prompt's", ("length of the prefix", "rel-L2, %")
        return _points(case, name, title, axes, list(zip(at, values, strict=True)), "rel_l2_max", 100)
    if "decode_regret" in series:
        title, axes = "Regret of each decoded token by the prefill's logits", ("token", "regret, nats")
        return _points(case, name, title, axes, list(enumerate(series["decode_regret"])), "regret_max")
    return None


def _draws(case: CaseResult, name: str) -> Plot:
    counts = case.series["draws_by_rank"]
    expected = sum(counts) / len(counts)
    x, y = Axis("share of the probability, likeliest ids first", 0, 1), Axis("draws", 0, max(*counts, 1) * 1.15)
    chart = Chart(f"{case.case}: draws by rank", f"{number(sum(counts))} draws in {len(counts)} bins.", x, y, 220)
    for index, amount in enumerate(counts):
        chart.bar(index / len(counts), (index + 1) / len(counts), amount, "", f"{number(amount)} draws")
    chart.level(expected, f"expected {number(expected)}")
    caption = "Draws by their place in the distribution that the sampling rule gives: level for a right sampler."
    return Plot("Draws by rank", caption, chart.render(name))


def _points(
    case: CaseResult,
    name: str,
    title: str,
    axes: tuple[str, str],
    points: Sequence[tuple[float, float]],
    metric: str,
    factor: float = 1,
) -> Plot:
    """factor: from a value to the unit of its axis."""
    limit = next((check.limit for check in case.checks if check.metric == metric), math.nan)
    shown = [factor * value for value in (*(value for _, value in points), limit) if value > 0]
    x = Axis(axes[0], 0, max(1.0, *(place for place, _ in points)))
    told = _range_words([value for _, value in points], metric)
    chart = Chart(f"{case.case}: {title}", told, x, Axis.decades(axes[1], shown, factor * LEAST, 1e5), 220)
    for place, value in points:
        height = factor * value if math.isfinite(value) else chart.y.high
        beyond = not math.isfinite(value) or value > limit
        chart.point(place, height, "bad" if beyond else "", f"{place:g}: {show_value(metric, value)}")
    if limit > 0:
        chart.level(factor * limit, f"limit {show_value(metric, limit)}")
    return Plot(title, f"{told}.", chart.render(name))


def _draw_errors(chart: Chart, case: CaseResult, style: str) -> None:
    places, values = _positions(case), case.series["rel_l2"]
    shift = 1 if chart.x.log else 0
    chart.line([(place + shift, 100 * value) for place, value in zip(places, values, strict=True)], style, case.case)
    for place, value in zip(places, values, strict=True):
        if not math.isfinite(value):
            chart.point(place + shift, chart.y.high, "bad", f"{case.case}, position {place:g}: NaN or infinite")


def _draw_limit(chart: Chart, cases: Sequence[CaseResult], *metrics: str) -> None:
    """The strictest limit of the first metric that has one."""
    for metric in metrics:
        limits = [check.limit for case in cases for check in case.checks if check.metric == metric]
        if limits:
            of_prompt = " of a whole prompt" if metric == "rel_l2" else ""
            chart.level(100 * min(limits), f"limit{of_prompt} {show_value(metric, min(limits))}")
            return


def _error_axis(cases: Sequence[CaseResult]) -> Axis:
    values = [value for case in cases for value in case.series["rel_l2"]]
    limits = [check.limit for case in cases for check in case.checks if check.metric in ("rel_l2", "rel_l2_max")]
    return Axis.decades("rel-L2, %", [100 * value for value in (*values, *limits)], 100 * LEAST, 1e5)


def _with(report: RunReport, *names: str) -> list[CaseResult]:
    return [case for case in report.cases if case.family in COMPARED and all(case.series.get(name) for name in names)]


def _positions(case: CaseResult) -> list[float]:
    length = len(case.series["rel_l2"])
    given = case.series.get("position", [])
    return list(given) if len(given) == length else [float(index) for index in range(length)]


def _worst(values: Sequence[float]) -> float:
    """The largest, NaN above all."""
    return max(values, key=lambda value: (math.isnan(value), value))


def _range_words(values: Sequence[float], metric: str) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "no finite value"
    bad = len(values) - len(finite)
    words = f"{show_value(metric, min(finite))} to {show_value(metric, max(finite))}"
    return f"{words}, {bad} not finite" if bad else words


def _failed_words(failed: Sequence[str], most: int = 3) -> str:
    if not failed:
        return ""
    rest = f" and {len(failed) - most} more" if len(failed) > most else ""
    return f" In red: {', '.join(failed[:most])}{rest}."
