"""The report for a pull request: GitHub's Markdown, short at the top, everything else folded away."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from gpa_conformance.report import ascend, speech
from gpa_conformance.report.facts import (
    STATE_SIGNS,
    STATE_WORDS,
    count,
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


def render(report: RunReport) -> str:
    """The document, ending in a newline."""
    outcome = verdict(report)
    parts = [
        f"### {'✅' if outcome.passed else '❌'} {plain(outcome.sentence)}",
        plain(f"{proof(report)}."),
        *(f"> {plain(note)}" for note in outcome.notes),
        bullets(map(plain, report.family_lines())),
        _failures([case for case in report.cases if case.failed]),
        _speech(report),
        _limits(report),
        folded("Speech, by voice and by utterance", _voices(report)),
        folded("The Ascend report's figures", _ascend(report)),
        folded(f"All {count(len(report.cases), 'case')}", _cases(report)),
        folded("To repeat this run", _repeat(report)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


_ESCAPED = str.maketrans({sign: f"&#{ord(sign)};" for sign in "&<>`*[]|\\~#@"})


def plain(text: object) -> str:
    """Text in one line that Markdown and HTML take as text."""
    return " ".join(str(text).split()).translate(_ESCAPED)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> str:
    """A table of text cells; right: indexes of the columns that are aligned to the right."""
    lines = [
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('---:' if index in right else '---' for index in range(len(columns)))}|",
        *(f"| {' | '.join(map(plain, row))} |" for row in rows),
    ]
    return "\n".join(lines)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def folded(title: str, content: str) -> str:
    """A block that opens on a click; nothing if it is empty."""
    return f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>" if content else ""


def _failures(cases: Sequence[CaseResult], most: int = 5) -> str:
    """The first failures with their reasons, the others folded away."""
    if not cases:
        return ""
    lines = [
        f"**{plain(case.case)}** ({plain(case.title)}): {plain(case.reason or 'no reason was given')}" for case in cases
    ]
    rest = folded(f"{count(len(lines) - most, 'more failed case')}", bullets(lines[most:])) if len(lines) > most else ""
    return "\n\n".join(filter(None, (bullets(lines[:most]), rest)))


def _limits(report: RunReport) -> str:
    rows = [
        (
            STATE_SIGNS["passed" if each.worst.passed else "failed"],
            each.worst.metric,
            show_value(each.worst.metric, each.worst.value),
            show_limit(each.worst),
            each.case.case,
            each.worst.source,
        )
        for each in limited(report)
    ]
    return table(("", "metric", "worst", "limit", "worst case", "source of the limit"), rows, (2, 3)) if rows else ""


def _speech(report: RunReport) -> str:
    rows = [row.cells() for row in speech.rows(report)]
    return f"{table(speech.COLUMNS, rows)}\n\n{plain(speech.NOTE)}" if rows else ""


def _voices(report: RunReport) -> str:
    parts = [f"{case}, by voice:\n\n{table(columns, rows)}" for case, columns, rows in speech.voices(report)]
    parts += [f"{case}, not right:\n\n{table(columns, rows)}" for case, columns, rows in speech.wrong(report)]
    return "\n\n".join(parts)


def _ascend(report: RunReport) -> str:
    parts = []
    for scope, words in ascend.SCOPES.items():
        found = ascend.rows(report, scope)
        if found:
            total = ascend.total(found)
            rows = [row.cells() for row in (*found, total)]
            parts += [f"{ascend.TITLE}, {words}:", table(ascend.COLUMNS, rows, (1, 2, 3, 4))]
            parts.append(bullets(map(plain, ascend.verdicts(total))))
    return "\n\n".join(parts)


def _cases(report: RunReport) -> str:
    rows = []
    for case in report.cases:
        check = decisive(case)
        figure = show_check(check) if check else ""
        note = case.reason if not case.failed else ""
        sign = f"{STATE_SIGNS[case.status]} {STATE_WORDS[case.status]}"
        rows.append((case.case, sign, "; ".join(filter(None, (figure, note))), f"{case.seconds:.1f}"))
    return table(("case", "state", "decisive figure", "s"), rows, (3,))


def _repeat(report: RunReport) -> str:
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in report.versions.items())
    files = report.model.get("files", {})
    lines = [
        *(f"{name}: {plain(value)}" for name, value in identity(report)),
        f"versions: {plain(versions)}",
        f"machine: {plain('; '.join(f'{name} {value}' for name, value in report.machine.items()))}",
        *(f"{plain(name)}: sha256 {plain(digest)}" for name, digest in files.items()),
        f"baseline: checksum {plain(report.baseline.get('checksum', '?'))}",
        f"seeds: {plain(dict(report.seeds))}",
        f"took {duration(report.seconds)}; schema {report.schema}",
    ]
    command = shlex.join(report.command).replace("```", "'''")
    return f"```sh\n{command}\n```\n\n{bullets(lines)}"
