"""The report as one HTML page: self-contained, readable on a phone and in the dark, without a script."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

from gpa_conformance.report import ascend, plots, speech
from gpa_conformance.report.facts import (
    STATE_SIGNS,
    STATE_WORDS,
    count,
    decisive,
    duration,
    identity,
    limited,
    number,
    proof,
    show_check,
    show_limit,
    show_value,
    used,
    verdict,
)
from gpa_conformance.report.markup import Column, Html, element, facts, figure, join, page, section, state, table
from gpa_conformance.results import CaseResult, RunReport

TOLD = ("known-failure", "unexpected-pass")
"""States besides failures that a reader must hear of."""

MOST_REASONS = 3


def render(report: RunReport) -> str:
    """The page."""
    engine = report.engine
    name = f"{engine.get('backend', '?')} {engine.get('dtype', '?')} on {engine.get('device', '?')}"
    body = join(
        [
            element(
                "header", join([element("p", "gpa-conformance", "eyebrow"), element("h1", name), _verdict(report)])
            ),
            element(
                "main",
                join(
                    [
                        facts(identity(report)),
                        section("Coverage", _coverage(report), name="coverage"),
                        section("What failed", *_failures(report), name="failures"),
                        section("Distance from the baseline", _plots(report), _limits(report), name="distance"),
                        section("Speech", *_speech(report), name="speech"),
                        section("The Ascend report's figures", *_ascend(report), name="ascend"),
                        section("Cases", *_cases(report), name="cases"),
                        section("To repeat this run", *_repeat(report), name="repeat"),
                    ]
                ),
            ),
        ]
    )
    return page(f"{name}: {report.outcome} - gpa-conformance", body)


def _verdict(report: RunReport) -> Html:
    outcome = verdict(report)
    notes = [element("li", note) for note in outcome.notes]
    parts = [
        element("strong", f"{'✓' if outcome.passed else '✗'} {outcome.sentence}."),
        element("p", f"{proof(report).capitalize()}."),
        element("ul", join(notes)) if notes else "",
    ]
    return element("div", join(filter(None, parts)), "verdict" if outcome.passed else "verdict failed", role="status")


def _coverage(report: RunReport) -> Html:
    """A line of cells per family; each cell leads to its case."""
    lines = []
    for family, cases in report.families.items():
        line = report_line(report, family)
        cells = [element("li", _cell(case)) for case in cases]
        name = join([family, element("small", line)], "")
        lines.append(element("div", name, "name"))
        lines.append(element("ul", join(cells), "cells", aria_label=f"cases of {family}"))
    present = {case.status for case in report.cases}
    key = ", ".join(f"{STATE_SIGNS[each]} {STATE_WORDS[each]}" for each in STATE_WORDS if each in present)
    return join([element("div", join(lines), "families"), element("p", f"Each cell is a case: {key}.", "small quiet")])


def report_line(report: RunReport, family: str) -> str:
    """What the family's line says after its name: "12/12"."""
    lines = dict(zip(report.families, report.family_lines(), strict=True))
    return lines[family].removeprefix(family).strip()


def _cell(case: CaseResult) -> Html:
    words = f"{case.case}: {STATE_WORDS[case.status]}. {case.title}"
    sign = STATE_SIGNS[case.status]
    return element("a", sign, case.status, href=f"#{_anchor(case)}", title=words, aria_label=words)


def _failures(report: RunReport) -> list[Html]:
    """Per family the first reasons, the others folded away."""
    parts = []
    for family, cases in report.families.items():
        told = [_failure(case) for case in cases if case.failed or case.status in TOLD]
        if not told:
            continue
        parts += [element("h3", family), *told[:MOST_REASONS]]
        if rest := told[MOST_REASONS:]:
            more = element("summary", f"{len(rest)} more of {family}")
            parts.append(element("details", join([more, element("div", join(rest), "body")])))
    return parts


def _failure(case: CaseResult) -> Html:
    link = element("a", case.case, href=f"#{_anchor(case)}")
    head = element("p", join([state(case.status), link, element("span", case.title, "quiet")], " "))
    return element("div", join([head, element("p", case.reason or "no reason was given", "reason")]), "failure")


def _plots(report: RunReport) -> Html:
    kinds = (plots.errors_by_position, plots.kl_histogram, plots.margin_against_regret, plots.limits_used)
    figures = [figure(*plot) for kind in kinds if (plot := kind(report)) is not None]
    return element("div", join(figures), "plots") if figures else Html("")


def _limits(report: RunReport) -> Html:
    found = limited(report)
    if not found:
        return Html("")
    columns = (
        Column("metric", tight=True),
        Column("worst", number=True),
        Column("limit", number=True),
        Column("worst case"),
        Column("cases", number=True),
        Column("where the limit comes from"),
    )
    rows = [
        (
            each.worst.metric,
            show_value(each.worst.metric, each.worst.value),
            show_limit(each.worst),
            element("a", each.case.case, href=f"#{_anchor(each.case)}"),
            each.cases,
            each.worst.source,
        )
        for each in found
    ]
    title = (
        f"Limits ({report.engine.get('limits', '?')}) and the value that comes nearest to each, or furthest beyond it"
    )
    return table(title, columns, rows, ["" if each.worst.passed else "missed" for each in found])


def _ascend(report: RunReport) -> list[Html]:
    parts = []
    for scope, words in ascend.SCOPES.items():
        found = ascend.rows(report, scope)
        if not found:
            continue
        total = ascend.total(found)
        columns = [Column(name, number=index in (1, 2, 3, 4)) for index, name in enumerate(ascend.COLUMNS)]
        rows = [(*row.cells()[:-1], _word(row.verdict)) for row in (*found, total)]
        parts.append(table(f"{words[0].upper()}{words[1:]}", columns, rows, [*("" for _ in found), "total"]))
        lines = element("ul", join(element("li", line, "mono") for line in ascend.verdicts(total)))
        parts.append(element("p", f"{ascend.TITLE}, {words}:"))
        parts.append(lines)
    if parts:
        note = "These limits know no dtype and decide nothing here; those of the dtype, above, do."
        parts.append(element("p", note, "small quiet"))
    return parts


def _speech(report: RunReport) -> list[Html]:
    """The figures; voices and utterances folded away."""
    rows = [row.cells() for row in speech.rows(report)]
    if not rows:
        return []
    columns = [Column(name, tight=name == "case") for name in speech.COLUMNS]
    parts = [table(speech.TITLE[0].upper() + speech.TITLE[1:], columns, rows), element("p", speech.NOTE, "small quiet")]
    for title, tables in (("By voice", speech.voices(report)), ("Not right", speech.wrong(report))):
        told = [
            table(f"{title}: {case}", [Column(name, number=name not in ("voice", "said")) for name in names], found)
            for case, names, found in tables
        ]
        if told:
            parts.append(element("details", join([element("summary", title), element("div", join(told), "body")])))
    return parts


def _word(word: str) -> Html:
    return element("span", word, "state passed" if word == "PASS" else "state failed")


def _cases(report: RunReport) -> list[Html]:
    parts = []
    for family, cases in report.families.items():
        parts.append(element("h3", f"{family} {report_line(report, family)}"))
        parts.extend(_case(case) for case in cases)
    return parts


def _case(case: CaseResult) -> Html:
    check = decisive(case)
    words = [state(case.status), element("span", case.case, "case"), element("span", case.title, "quiet")]
    if check is not None:
        words.append(element("span", show_check(check), "decisive small"))
    elif case.reason:
        words.append(element("span", case.reason[:120], "decisive small"))
    plot = plots.case_plot(case, f"plot-{_anchor(case)}")
    body = [
        element("p", case.reason, "reason") if case.reason else "",
        _checks(case),
        element("div", figure(*plot), "plots") if plot else "",
        _measured(case),
        element("p", f"took {duration(case.seconds)}", "small quiet"),
    ]
    inside = join([element("summary", join(words, " ")), element("div", join(filter(None, body)), "body")])
    return element("details", inside, "bad" if case.failed else "", id=_anchor(case))


def _checks(case: CaseResult) -> Html:
    if not case.checks:
        return Html("")
    columns = (
        Column("check"),
        Column("value", number=True),
        Column("limit", number=True),
        Column("of the limit", number=True),
        Column("where the limit comes from"),
    )
    rows = [
        (
            check.metric,
            show_value(check.metric, check.value),
            show_limit(check),
            f"{100 * used(check):.0f} %" if math.isfinite(used(check)) else "broken",
            check.source,
        )
        for check in case.checks
    ]
    return table(f"Checks of {case.case}", columns, rows, ["" if check.passed else "missed" for check in case.checks])


def _measured(case: CaseResult) -> Html:
    shown = {check.metric for check in case.checks}
    rest = {name: value for name, value in case.metrics.items() if name not in shown}
    if not rest:
        return Html("")
    listed = ", ".join(f"{name} {show_value(name, value)}" for name, value in rest.items())
    return element("p", f"Also measured: {listed}.", "small quiet")


def _repeat(report: RunReport) -> list[Html]:
    command = shlex.join(report.command) if report.command else "not recorded"
    lines = [
        ("versions", _named(report.versions)),
        ("machine", _named(report.machine)),
        ("model files", _hashes(report.model.get("files", {}))),
        (
            "baseline",
            _named({key: value for key, value in report.baseline.items() if key not in ("files", "versions")}),
        ),
        ("baseline's versions", _named(report.baseline.get("versions", {}))),
        ("seeds", _named(report.seeds)),
        ("time", f"{report.started}, {duration(report.seconds)}, {count(len(report.cases), 'case')}"),
        ("report", report.schema),
    ]
    return [element("pre", command), facts(line for line in lines if line[1])]


def _named(values: Mapping[str, Any]) -> Html:
    """Names and values in one line; a missing package is told as such."""
    shown = [f"{name} {_value(value)}" for name, value in values.items() if value not in ({}, [], "")]
    return element("span", "; ".join(shown), "small") if shown else Html("")


def _value(value: Any) -> str:
    if value is None:
        return "not installed"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_value(each)}" for name, each in value.items())
    return number(value) if isinstance(value, float) else str(value)


def _hashes(values: Mapping[str, Any]) -> Html:
    lines = [element("span", f"{digest}  {name}", "mono") for name, digest in values.items()]
    return join(lines, "<br>")


def _anchor(case: CaseResult) -> str:
    return "case-" + re.sub(r"[^A-Za-z0-9]+", "-", case.case)
