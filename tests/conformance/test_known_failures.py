"""The known-failures file: what it says, and what it makes of a result."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpa_codecs.errors import GpaError
from gpa_conformance.known_failures import apply_known_failures, read_known_failures
from gpa_conformance.results import CaseResult, Status

CASES = {"contract/seed", "contract/stop"}


def known(tmp_path: Path, text: str) -> dict[str, str]:
    file = tmp_path / "known.txt"
    file.write_text(text, encoding="utf-8")
    return read_known_failures(file, CASES)


def result(status: Status, reason: str = "") -> CaseResult:
    return CaseResult("contract/seed", "contract", "Seeds", status, reason)


def test_comments_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    text = "# mine\n\n contract/seed   one generator for all  # really\ncontract/stop\tthe stop id is kept\n"
    assert known(tmp_path, text) == {
        "contract/seed": "one generator for all",
        "contract/stop": "the stop id is kept",
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("contract/sed  typo", r"line 1: there is no case 'contract/sed'"),
        ("\ncontract/seed", r"line 2: contract/seed has no reason"),
        ("contract/seed # only a comment", r"line 1: contract/seed has no reason"),
        ("contract/seed a\ncontract/seed b", r"line 2: contract/seed is listed twice"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(GpaError, match=named):
        known(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(GpaError, match=r"--known-failures .*nothing"):
        read_known_failures(tmp_path / "nothing", CASES)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(GpaError, match="is not UTF-8"):
        read_known_failures(tmp_path / "binary", CASES)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("failed", "known-failure"),
        ("error", "known-failure"),
        ("passed", "unexpected-pass"),
        ("skipped", "skipped"),
    ],
)
def test_a_listed_case_is_known_or_a_surprise(status: Status, expected: Status) -> None:
    changed = apply_known_failures(result(status, "token 3 differs"), {"contract/seed": "one generator"})
    assert changed.status == expected
    if status != "skipped":
        assert "one generator" in changed.reason
    if expected == "known-failure":
        assert "token 3 differs" in changed.reason


def test_other_cases_are_left_alone() -> None:
    assert apply_known_failures(result("failed"), {"contract/stop": "kept"}).status == "failed"
