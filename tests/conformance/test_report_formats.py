"""The report on a terminal, in Markdown, as a page, and many runs side by side."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from gpa_codecs.errors import GpaError
from gpa_conformance.report import html, markdown, matrix, terminal
from gpa_conformance.results import RunReport
from tests.conformance.sample_reports import HOSTILE, sample_report

ELSEWHERE = ("script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image")
VOID = ("meta", "br")


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if values.get("id") else []  # type: ignore[list-item]
        self.targets += [values["href"]] if values.get("href") else []  # type: ignore[list-item]
        assert not [name for name in values if name.startswith("on") or name == "src"]
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def printed(report: RunReport, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    terminal.show(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", [False, True])
def test_the_page_is_whole_and_needs_nothing_but_itself(fault: bool) -> None:
    text = html.render(sample_report(fault=fault))
    page = Page(text)
    assert not set(ELSEWHERE) & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", text)
    assert len(page.ids) == len(set(page.ids))
    assert {target.removeprefix("#") for target in page.targets} <= set(page.ids), "a link that leads nowhere"
    assert text.count("<svg") > 3
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_what_an_engine_says_is_text_in_every_form() -> None:
    report = sample_report(fault=True, target="--engine <b>[bold]x[/bold]</b>")
    page = html.render(report)
    assert "<script" not in page
    assert "<b>[bold]" not in page
    assert HOSTILE.splitlines()[0] in " ".join(Page(page).words)
    document = markdown.render(report)
    assert "<script" not in document
    assert "<b>" not in document
    assert HOSTILE.splitlines()[0] in printed(report, width=200)
    assert "--engine <b>[bold]x[/bold]</b>" in printed(report)
    for text in (matrix.html([report]), matrix.markdown([report])):
        assert "<script" not in text


def test_every_form_says_everything_that_repeats_the_run() -> None:
    report = sample_report()
    for text in (" ".join(Page(html.render(report)).words), markdown.render(report)):
        for part in (
            "gpa-conformance run --model tiny --backend torch --dtype bfloat16",
            *(str(digest) for digest in report.model["files"].values()),
            report.baseline["checksum"],
            "2.6.0",
            "not installed",
            "Example CPU",
            "1000",
            report.started,
            report.cases[0].checks[0].source,
        ):
            assert part in text, part


def test_every_form_has_coverage_verdict_and_proof() -> None:
    report = sample_report(fault=True)
    for text in (" ".join(Page(html.render(report)).words), markdown.render(report), printed(report)):
        assert "not the same model" in text
        assert "0/4 (4 skipped: no batch)" in text
        assert "95% confidence" in text
        assert "as in the Ascend report" in text
        assert "SIGSEGV" in text


def test_the_terminal_ends_with_the_verdict() -> None:
    assert "is the same model" in printed(sample_report()).strip().splitlines()[-1]
    assert "is not the same model" in printed(sample_report(fault=True)).strip().splitlines()[-1]


def test_tables_of_markdown_have_rows_of_one_width() -> None:
    for text in (
        markdown.render(sample_report(fault=True)),
        matrix.markdown([sample_report(), sample_report("float32")]),
    ):
        block: list[int] = []
        for line in [*text.splitlines(), ""]:
            if line.startswith("|"):
                block.append(line.count("|"))
            else:
                assert len(set(block)) <= 1, line
                block = []


def test_runs_side_by_side_have_a_column_each() -> None:
    reports = [sample_report(), sample_report("float32"), sample_report(fault=True)]
    text = matrix.markdown(reports)
    assert "| | torch bfloat16 cpu &#35;1 | torch float32 cpu | torch bfloat16 cpu &#35;2 |" in text
    assert "| **verdict** | ✅ passed | ✅ passed | ❌ failed |" in text
    assert "| batch | 4/4 | 4/4 | 0/4 (4 skipped: no batch) |" in text
    page = Page(matrix.html(reports))
    assert not set(ELSEWHERE) & set(page.tags)
    console = Console(file=io.StringIO(), width=200)
    matrix.show(reports, console)
    assert "torch float32 cpu" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_case_that_a_run_did_not_have_is_said() -> None:
    short = replace(sample_report("float32"), cases=sample_report("float32").cases[:3])
    text = matrix.markdown([sample_report(), short])
    assert re.search(r"\| logits/spread \| ✓ .* \| not run \|", text)
    assert "| long | 2/2 | - |" in text


def test_runs_of_other_checkpoints_are_refused_with_both_hashes() -> None:
    other = sample_report(model={"name": "other", "files": {"model.safetensors": "bb" * 32}})
    with pytest.raises(GpaError, match="another checkpoint") as refused:
        matrix.build([sample_report(), other])
    assert "1f" * 32 in str(refused.value)
    assert "none" in str(refused.value)


def test_runs_against_other_baselines_are_flagged() -> None:
    report = sample_report()
    other = replace(report, baseline=dict(report.baseline) | {"checksum": "77" * 32})
    assert matrix.build([report, report]).warnings == ()
    for text in (matrix.markdown([report, other]), matrix.html([report, other])):
        assert "2 different baselines" in text


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(GpaError, match="no report to compare"):
        matrix.build([])
