"""Many runs side by side: backend x dtype x case.

Only runs of the same checkpoint can be compared: others are refused. Runs against different baselines of it are
compared with a warning, since each baseline was made on its own machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpa_codecs.errors import GpaError
from gpa_conformance.progress import STYLES
from gpa_conformance.report import markdown as md
from gpa_conformance.report import markup, speech
from gpa_conformance.report.facts import (
    STATE_SIGNS,
    STATE_WORDS,
    decisive,
    limited,
    number,
    proof,
    show_check,
    show_limit,
    show_value,
    verdict,
)
from gpa_conformance.results import CaseResult, RunReport


@dataclass(frozen=True, slots=True)
class Matrix:
    """names: one per run, unique. families, cases: rows in the order in which they first ran. spoken: case and
    name of the figures of the family "speech". warnings: in words."""

    reports: tuple[RunReport, ...]
    names: tuple[str, ...]
    families: tuple[str, ...]
    cases: tuple[str, ...]
    metrics: tuple[str, ...]
    spoken: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]

    def case(self, run: int, case_id: str) -> CaseResult | None:
        """None where the run did not have the case."""
        return next((case for case in self.reports[run].cases if case.case == case_id), None)

    def family(self, run: int, family: str) -> str:
        """ "12/12", or "" where the run did not have the family."""
        lines = dict(zip(self.reports[run].families, self.reports[run].family_lines(), strict=True))
        return lines.get(family, family).removeprefix(family).strip()

    def speech(self, run: int, case: str, short: str) -> str:
        """A figure of the family "speech", "" where the run does not have it."""
        found = (row for row in speech.rows(self.reports[run]) if (row.case, row.short) == (case, short))
        return next((row.found for row in found), "")

    def worst(self, run: int, metric: str) -> str:
        """The worst value of a limited metric and its limit, marked where it is beyond."""
        found = [each for each in limited(self.reports[run]) if each.worst.metric == metric]
        shown = (
            f"{'' if each.worst.passed else '✗ '}{show_value(metric, each.worst.value)} ({show_limit(each.worst)})"
            for each in found
        )
        return "; ".join(dict.fromkeys(shown))


def build(reports: Sequence[RunReport]) -> Matrix:
    """Raises GpaError for runs that cannot be compared: no run at all, or different checkpoints."""
    if not reports:
        raise GpaError("there is no report to compare; name the files that gpa-conformance run --json wrote")
    first = reports[0]
    for index, other in enumerate(reports[1:], 2):
        _check_model(first, other, index)
    baselines = {str(report.baseline.get("checksum")) for report in reports}
    warnings = []
    if len(baselines) > 1:
        told = ", ".join(sorted(f"{checksum[:12]}…" for checksum in baselines))
        warnings.append(f"these runs were held against {len(baselines)} different baselines of the checkpoint: {told}")
    schemas = {str(report.versions.get("gpa-engines")) for report in reports}
    if len(schemas) > 1:
        warnings.append(f"the suite's version differs between the runs: {', '.join(sorted(schemas))}")
    return Matrix(
        tuple(reports),
        _names(reports),
        tuple(dict.fromkeys(family for report in reports for family in report.families)),
        tuple(dict.fromkeys(case.case for report in reports for case in report.cases)),
        tuple(dict.fromkeys(each.worst.metric for report in reports for each in limited(report))),
        tuple(dict.fromkeys((row.case, row.short) for report in reports for row in speech.rows(report) if row.short)),
        tuple(warnings),
    )


def show(reports: Sequence[RunReport], console: Console) -> None:
    """The matrix on a terminal."""
    matrix = build(reports)
    for warning in matrix.warnings:
        console.print(Text(f"warning: {warning}", "yellow"), soft_wrap=True)
    table = Table(title=f"{matrix.reports[0].model.get('name', '?')}: {_sign_key(matrix)}", title_justify="left")
    table.add_column("case", overflow="fold")
    for name in matrix.names:
        table.add_column(Text(name), overflow="fold")
    runs = range(len(matrix.names))
    for case_id in matrix.cases:
        cells = [_terminal_cell(matrix.case(run, case_id)) for run in runs]
        last = case_id == [each for each in matrix.cases if each.split("/")[0] == case_id.split("/")[0]][-1]
        table.add_row(Text(case_id), *cells, end_section=last)
    for family in matrix.families:
        table.add_row(Text(family, "bold"), *(Text(matrix.family(run, family)) for run in runs))
    for case, short in matrix.spoken:
        table.add_row(Text(f"{case}: {short}"), *(Text(matrix.speech(run, case, short) or "-") for run in runs))
    console.print(table)
    for name, report in zip(matrix.names, matrix.reports, strict=True):
        outcome = verdict(report)
        style = "green" if outcome.passed else "bold red"
        console.print(Text(f"{name}: {outcome.sentence}", style), soft_wrap=True)


def markdown(reports: Sequence[RunReport]) -> str:
    """The matrix in GitHub's Markdown, ending in a newline."""
    matrix = build(reports)
    runs = range(len(matrix.names))
    columns = tuple(map(md.plain, matrix.names))
    signs = {"passed": "✅", "failed": "❌", "interrupted": "⏸️"}
    outcome = [f"{signs[report.outcome]} {report.outcome}" for report in matrix.reports]
    summary = [
        ("**verdict**", *outcome),
        *((family, *(md.plain(matrix.family(run, family)) for run in runs)) for family in matrix.families),
        *((metric, *(md.plain(matrix.worst(run, metric)) for run in runs)) for metric in map(str, matrix.metrics)),
    ]
    summary += [
        (md.plain(f"{case}: {short}"), *(md.plain(matrix.speech(run, case, short)) for run in runs))
        for case, short in matrix.spoken
    ]
    head = f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
    body = "\n".join(f"| {' | '.join(cell or '-' for cell in row)} |" for row in summary)
    cases = [(case_id, *(_words(matrix.case(run, case_id)) for run in runs)) for case_id in matrix.cases]
    parts = [
        f"### {md.plain(matrix.reports[0].model.get('name', '?'))}: {len(matrix.names)} engines",
        *(f"> ⚠️ {md.plain(warning)}" for warning in matrix.warnings),
        head + body,
        md.folded("Every case", md.table(("case", *columns), cases)),
        md.folded("What the counts prove", md.bullets(md.plain(line) for line in _proofs(matrix))),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def html(reports: Sequence[RunReport]) -> str:
    """The matrix as one HTML page."""
    matrix = build(reports)
    runs = range(len(matrix.names))
    columns = (markup.Column("case", tight=True), *(markup.Column(name) for name in matrix.names))
    model = matrix.reports[0].model.get("name", "?")
    title = f"{model}: {len(matrix.names)} engines"
    warnings = [markup.element("p", f"Warning: {warning}.", "verdict failed") for warning in matrix.warnings]
    cases = [(case_id, *(_html_cell(matrix.case(run, case_id)) for run in runs)) for case_id in matrix.cases]
    families = [(family, *(matrix.family(run, family) or "–" for run in runs)) for family in matrix.families]
    metrics = [(metric, *(matrix.worst(run, metric) or "–" for run in runs)) for metric in matrix.metrics]
    spoken = [
        (f"{case}: {short}", *(matrix.speech(run, case, short) or "–" for run in runs)) for case, short in matrix.spoken
    ]
    outcome = ("verdict", *(_html_verdict(report) for report in matrix.reports))
    first = markup.Column("", tight=True)
    body = markup.join(
        [
            markup.element("p", "gpa-conformance", "eyebrow"),
            markup.element("h1", title),
            *warnings,
            markup.section(
                "Side by side",
                markup.table(
                    "Families and limits of every run", (first, *columns[1:]), [outcome, *families, *spoken, *metrics]
                ),
                markup.element("ul", markup.join(markup.element("li", line) for line in _proofs(matrix))),
                name="summary",
            ),
            markup.section("Every case", markup.table(f"Signs: {_sign_key(matrix)}", columns, cases), name="cases"),
            markup.section("The runs", markup.facts(_runs(matrix)), name="runs"),
        ]
    )
    return markup.page(f"{title} - gpa-conformance", body)


def _check_model(first: RunReport, other: RunReport, index: int) -> None:
    ours, theirs = (_files(report) for report in (first, other))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise GpaError(
                f"report {index} ({other.target}) is of another checkpoint than report 1 ({first.target}): its {name} "
                f"has sha256 {theirs.get(name, 'none')}, report 1's {ours.get(name, 'none')}; compare runs of one "
                "checkpoint"
            )


def _files(report: RunReport) -> Mapping[str, str]:
    return report.model.get("files") or {}


def _names(reports: Sequence[RunReport]) -> tuple[str, ...]:
    """ "torch bfloat16 cpu"; runs that are alike are numbered."""
    plain = [" ".join(str(report.engine.get(key, "?")) for key in ("backend", "dtype", "device")) for report in reports]
    names = []
    for index, name in enumerate(plain):
        same = plain[: index + 1].count(name)
        names.append(f"{name} #{same}" if plain.count(name) > 1 else name)
    return tuple(names)


def _sign_key(matrix: Matrix) -> str:
    present = {case.status for report in matrix.reports for case in report.cases}
    return ", ".join(f"{STATE_SIGNS[each]} {STATE_WORDS[each]}" for each in STATE_WORDS if each in present)


def _proofs(matrix: Matrix) -> list[str]:
    return [f"{name}: {proof(report)}" for name, report in zip(matrix.names, matrix.reports, strict=True)]


def _words(case: CaseResult | None) -> str:
    """Sign and decisive figure of a case; the reason where it was skipped."""
    if case is None:
        return "not run"
    check = decisive(case)
    figure = show_check(check) if check else case.reason
    return f"{STATE_SIGNS[case.status]} {figure}".strip()


def _terminal_cell(case: CaseResult | None) -> Text:
    return Text(_words(case), "dim") if case is None else Text(_words(case), STYLES[case.status])


def _html_cell(case: CaseResult | None) -> markup.Html:
    if case is None:
        return markup.element("span", "not run", "quiet")
    figure = _words(case)[len(STATE_SIGNS[case.status]) :]
    return markup.join([markup.state(case.status), markup.element("span", figure, "small quiet")], " ")


def _html_verdict(report: RunReport) -> markup.Html:
    outcome = report.outcome
    return markup.element("span", outcome, "quiet") if outcome == "interrupted" else markup.state(outcome)


def _runs(matrix: Matrix) -> list[tuple[str, str]]:
    return [
        (
            name,
            f"{report.target}, {report.started}, {number(report.seconds)} s, gpa-engines "
            f"{report.versions.get('gpa-engines') or '?'}, baseline {str(report.baseline.get('checksum', '?'))[:16]}",
        )
        for name, report in zip(matrix.names, matrix.reports, strict=True)
    ]
