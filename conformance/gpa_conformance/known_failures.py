"""The known-failures file: what an implementer knows to fail, kept beside the engine and not in the suite.

One case per line: its id, white space, and the reason. `#` starts a comment.

    # my engine, issue 12
    contract/seed    the runtime has one generator for all requests
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from gpa_codecs.errors import GpaError
from gpa_conformance.results import CaseResult


def read_known_failures(path: str | Path, case_ids: Collection[str]) -> dict[str, str]:
    """Reason by case id. Raises GpaError naming file and line for an id that does not exist and a missing reason."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise GpaError(f"--known-failures {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise GpaError(f"--known-failures {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    known: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        case_id, _, reason = line.partition("#")[0].strip().partition(" ")
        if "\t" in case_id:
            case_id, _, more = case_id.partition("\t")
            reason = f"{more} {reason}"
        if not case_id:
            continue
        where = f"{path}, line {number}"
        if case_id not in case_ids:
            raise GpaError(f"{where}: there is no case {case_id!r}; gpa-conformance cases lists all")
        if not reason.strip():
            raise GpaError(f"{where}: {case_id} has no reason; say why it fails")
        if case_id in known:
            raise GpaError(f"{where}: {case_id} is listed twice")
        known[case_id] = reason.strip()
    return known


def apply_known_failures(result: CaseResult, known: Mapping[str, str]) -> CaseResult:
    """A listed case that failed is a known failure; one that passed is an unexpected pass; else the result itself."""
    reason = known.get(result.case)
    if reason is None:
        return result
    if result.failed:
        told = f"{reason} (found: {result.reason})" if result.reason else reason
        return replace(result, status="known-failure", reason=f"known: {told}")
    if result.status == "passed":
        return replace(
            result, status="unexpected-pass", reason=f"it passed, but is listed as a known failure: {reason}"
        )
    return result
