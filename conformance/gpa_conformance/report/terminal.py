"""The report on a terminal: what was tested, the coverage, every case, what it proves, the verdict last."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpa_conformance.progress import STYLES
from gpa_conformance.report import ascend, speech
from gpa_conformance.report.facts import (
    STATE_WORDS,
    decisive,
    duration,
    identity,
    limited,
    proof,
    show_check,
    show_limit,
    show_value,
    verdict,
)
from gpa_conformance.results import CaseResult, RunReport


def show(report: RunReport, console: Console) -> None:
    """Print everything; text of the engine is printed as it is, never read as markup."""
    width = max(len(name) for name, _ in identity(report))
    for name, value in identity(report):
        console.print(Text.assemble((f"{name:{width}}  ", "dim"), value), soft_wrap=True)
    console.print()
    console.print(_cases(report))
    _ascend(report, console)
    _speech(report, console)
    if report.families:
        console.print(_limits(report))
    _failures(report, console)
    for line in report.family_lines():
        console.print(Text(line), soft_wrap=True)
    console.print()
    _verdict(report, console)


def _cases(report: RunReport) -> Table:
    table = Table(title="cases", title_justify="left")
    for name in ("case", "state", "decisive figure"):
        table.add_column(name, overflow="fold")
    table.add_column("s", justify="right")
    for cases in report.families.values():
        for number, case in enumerate(cases, 1):
            state = Text(STATE_WORDS[case.status], STYLES[case.status])
            table.add_row(
                Text(case.case), state, Text(_figure(case)), f"{case.seconds:.1f}", end_section=number == len(cases)
            )
    return table


def _figure(case: CaseResult) -> str:
    check = decisive(case)
    if check is None:
        return _short(case.reason)
    note = f"; {_short(case.reason)}" if case.reason and not case.failed else ""
    return show_check(check) + note


def _short(reason: str, length: int = 100) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _ascend(report: RunReport, console: Console) -> None:
    for scope, words in ascend.SCOPES.items():
        found = ascend.rows(report, scope)
        if not found:
            continue
        if scope == "last":
            table = Table(title=f"{ascend.TITLE}: {words}", title_justify="left")
            for name in ascend.COLUMNS:
                table.add_column(name, justify="left" if name == "prompt" else "right")
            for row in (*found, ascend.total(found)):
                *figures, word = row.cells()
                table.add_row(*map(Text, figures), _word(word), end_section=row is found[-1])
            console.print(table)
        console.print(f"{ascend.TITLE}, {words}:")
        for line in ascend.verdicts(ascend.total(found)):
            word, _, rest = line.partition(" ")
            console.print(Text.assemble("  ", _word(word), f" {rest}"), soft_wrap=True)
    if ascend.rows(report, "last"):
        console.print("  (its limits know no dtype; those below decide)")
        console.print()


def _speech(report: RunReport, console: Console) -> None:
    rows = speech.rows(report)
    if not rows:
        return
    table = Table(title=speech.TITLE, title_justify="left")
    for name in speech.COLUMNS:
        table.add_column(name, overflow="fold")
    for number, row in enumerate(rows, 1):
        last = number == len(rows) or rows[number].case != row.case
        table.add_row(*map(Text, row.cells()), end_section=last)
    console.print(table)
    for case, columns, found in speech.voices(report):
        table = Table(title=f"{case}, by voice", title_justify="left")
        for name in columns:
            table.add_column(name, justify="left" if name == "voice" else "right")
        for cells in found:
            table.add_row(*map(Text, cells))
        console.print(table)
    console.print(Text(speech.NOTE, "dim"), soft_wrap=True)
    console.print()


def _word(word: str) -> Text:
    return Text(word, "green" if word == "PASS" else "bold red")


def _limits(report: RunReport) -> Table:
    table = Table(title=f"limits ({report.engine.get('limits', '?')}), each with its worst case", title_justify="left")
    for name in ("metric", "worst", "limit", "case", "where the limit comes from"):
        table.add_column(name, overflow="fold")
    for figure in limited(report):
        check = figure.worst
        worst = Text(show_value(check.metric, check.value), "" if check.passed else "bold red")
        limit = show_limit(check)
        table.add_row(check.metric, worst, limit, Text(figure.case.case), Text(check.source))
    return table


def _failures(report: RunReport, console: Console) -> None:
    told = [case for case in report.cases if case.failed or case.status in ("known-failure", "unexpected-pass")]
    for case in told:
        words = (f"{STATE_WORDS[case.status]} ", STYLES[case.status])
        console.print(Text.assemble(words, (case.case, "bold"), f" {case.title}"), soft_wrap=True)
        console.print(Text(f"  {case.reason or 'no reason was given'}"), soft_wrap=True)
    if told:
        console.print()


def _verdict(report: RunReport, console: Console) -> None:
    outcome = verdict(report)
    console.print(Text(proof(report)), soft_wrap=True)
    for note in outcome.notes:
        console.print(Text(note, "yellow"), soft_wrap=True)
    style = "bold green" if outcome.passed else "bold red"
    console.print(Text(f"{outcome.sentence} ({duration(report.seconds)})", style), soft_wrap=True)
