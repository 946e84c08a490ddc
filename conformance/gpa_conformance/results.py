"""What a run found: checks, case results, the whole report, and its JSON form.

The JSON document (schema "gpa-conformance/1") is a `RunReport` with its fields as keys, `cases` a list of `CaseResult`,
`checks` a list of `Check`. JSON has no NaN or infinity: they are written as the strings "NaN", "Infinity" and
"-Infinity" and come back as floats. A field is added only together with a new schema number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from gpa_codecs.errors import GpaError
from gpa_codecs.files import write_atomically

SCHEMA = "gpa-conformance/1"

Status = Literal["passed", "failed", "error", "skipped", "known-failure", "unexpected-pass"]
"""passed, failed: every check held, or one did not. error: a crash, a hang or an exception; counts as failed.
skipped: the engine or the checkpoint cannot do it, `reason` says what is missing. known-failure: failed (or broke) as
the known-failures file says. unexpected-pass: passed although the file lists it; reported, not failed."""

Relation = Literal["<=", ">=", "=="]

LONGEST_SERIES = 4096
"""Values of one series that a result may hold; `thin_series` shortens longer ones."""


@dataclass(frozen=True, slots=True)
class Check:
    """One value against one limit. source: where the limit comes from, for the reader of a report."""

    metric: str
    value: float
    limit: float
    relation: Relation
    passed: bool
    source: str

    def __str__(self) -> str:
        verb = "holds" if self.passed else "fails"
        return f"{self.metric} {self.value:.6g} {self.relation} {self.limit:g} {verb}"


def make_check(metric: str, value: float, relation: Relation, limit: float, source: str) -> Check:
    """Compare; a NaN on either side fails whatever the relation."""
    value, limit = float(value), float(limit)
    match relation:
        case "<=":
            passed = value <= limit
        case ">=":
            passed = value >= limit
        case "==":
            passed = value == limit
        case _:
            raise ValueError(f"relation {relation!r}; expected one of {get_args(Relation)}")
    return Check(metric, value, limit, relation, passed, source)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What one case found.

    case: id, as "logits/ascend-1". reason: empty for a plain pass; else why it failed, was skipped or is known.
    series: data for plots, by name, at most `LONGEST_SERIES` values each. tables: rows for a report, by name.
    seconds: wall time.
    """

    case: str
    family: str
    title: str
    status: Status
    reason: str = ""
    checks: tuple[Check, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    series: Mapping[str, list[float]] = field(default_factory=dict)
    tables: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"status {self.status!r}; expected one of {get_args(Status)}")
        if self.status == "passed" and not all(check.passed for check in self.checks):
            raise ValueError(f"case {self.case} is 'passed', but not all of its checks are")

    @property
    def ran(self) -> bool:
        """Whether the case was carried out at all."""
        return self.status != "skipped"

    @property
    def succeeded(self) -> bool:
        """Passed, expected or not."""
        return self.status in ("passed", "unexpected-pass")

    @property
    def failed(self) -> bool:
        """Failed or broke, and nobody knew."""
        return self.status in ("failed", "error")

    @property
    def failed_checks(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run of the suite on one engine, with everything that is needed to repeat it.

    engine: the fields of EngineInfo and the options it was created with. target: "backend torch", "engine pkg:factory".
    model: name, files (name -> sha256), vocab_size; speech: what that family was judged by. baseline: path, made_by,
    model files, versions. started: ISO 8601.
    digests: sha256 of the definition of every case that was asked for, by its id; those that are not among
    `cases` had not ended when the run was interrupted.
    """

    engine: Mapping[str, Any]
    target: str
    model: Mapping[str, Any]
    baseline: Mapping[str, Any]
    versions: Mapping[str, Any]
    machine: Mapping[str, Any]
    seeds: Mapping[str, Any]
    command: tuple[str, ...]
    started: str
    seconds: float
    cases: tuple[CaseResult, ...]
    digests: Mapping[str, str]
    schema: str = SCHEMA

    def count(self, *statuses: Status) -> int:
        """Cases with any of the statuses."""
        return sum(case.status in statuses for case in self.cases)

    @property
    def passed(self) -> int:
        return sum(case.succeeded for case in self.cases)

    @property
    def failed(self) -> int:
        return sum(case.failed for case in self.cases)

    @property
    def skipped(self) -> int:
        return self.count("skipped")

    @property
    def known(self) -> int:
        return self.count("known-failure")

    @property
    def families(self) -> dict[str, tuple[CaseResult, ...]]:
        """The cases by family, in the order in which the families first ran."""
        found: dict[str, list[CaseResult]] = {}
        for case in self.cases:
            found.setdefault(case.family, []).append(case)
        return {family: tuple(cases) for family, cases in found.items()}

    def family_lines(self) -> list[str]:
        """A line per family: "logits 12/12", "batch 3/4 (1 skipped: no batch)", "cache 1/2 (1 failed)"."""
        return [_family_line(family, cases) for family, cases in self.families.items()]

    @property
    def unreached(self) -> int:
        """Cases that had not ended when the run was interrupted."""
        return len(self.digests.keys() - {case.case for case in self.cases})

    @property
    def exit_code(self) -> int:
        """0 only if at least one case passed, none failed, and none was left when the run was interrupted; else 1."""
        return 0 if self.passed and not self.failed and not self.unreached else 1

    @property
    def outcome(self) -> Literal["passed", "failed", "interrupted"]:
        """The verdict in a word: failed before interrupted, since one failed case is enough."""
        if self.unreached and not self.failed:
            return "interrupted"
        return "passed" if self.exit_code == 0 else "failed"

    def to_dict(self) -> dict[str, Any]:
        """The document of this report: only what JSON can hold."""
        return _plain(self)

    def to_json(self, path: str | Path) -> None:
        """Write the document; an existing file is replaced only once the new one is whole. Raises OSError."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(Path(path), (text + "\n").encode())

    @classmethod
    def from_dict(cls, document: Any, source: str = "report") -> RunReport:
        """Read a document; raises GpaError naming `source` and what is wrong."""
        if not isinstance(document, dict) or "schema" not in document:
            raise GpaError(f"{source} is not a report of gpa-conformance: it has no 'schema'")
        if document["schema"] != SCHEMA:
            raise GpaError(f"{source} has schema {document['schema']!r}; this program reads {SCHEMA!r}")
        values = _fields(cls, document, source)
        cases = values["cases"]
        if not isinstance(cases, list):
            raise GpaError(f"{source}: 'cases' is {type(cases).__name__}; expected a list")
        values["cases"] = tuple(_case(case, f"{source}: case {n}") for n, case in enumerate(cases))
        values["command"] = tuple(str(word) for word in values["command"])
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path) -> RunReport:
        """Read a file that `to_json` wrote; raises GpaError naming the file and what is wrong with it."""
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise GpaError(f"{path}: {error.strerror or error}") from error
        except ValueError as error:
            raise GpaError(f"{path} is not JSON: {error}") from error
        return cls.from_dict(document, str(path))


def thin_series(values: Sequence[float], length: int = LONGEST_SERIES) -> list[float]:
    """At most `length` values that keep every peak: the largest (NaN above all) of each of `length` equal stretches."""
    if len(values) <= length:
        return [float(value) for value in values]
    edges = [len(values) * n // length for n in range(length + 1)]
    stretches = (values[start:end] for start, end in pairwise(edges))
    return [float(max(stretch, key=lambda value: (math.isnan(value), value))) for stretch in stretches]


def _family_line(family: str, cases: Sequence[CaseResult]) -> str:
    notes = []
    if failed := sum(case.failed for case in cases):
        notes.append(f"{failed} failed")
    if known := sum(case.status == "known-failure" for case in cases):
        notes.append(f"{known} known to fail")
    if surprises := sum(case.status == "unexpected-pass" for case in cases):
        notes.append(f"{surprises} passed unexpectedly")
    if skipped := [case.reason for case in cases if case.status == "skipped"]:
        notes.append(f"{len(skipped)} skipped: {'; '.join(dict.fromkeys(skipped))}")
    note = f" ({', '.join(notes)})" if notes else ""
    return f"{family} {sum(case.succeeded for case in cases)}/{len(cases)}{note}"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return float(value)
    if isinstance(value, RunReport | CaseResult | Check):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return _plain(value.tolist())
    return str(value)


_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _numbers(value: Any) -> Any:
    """The inverse of `_plain` for what is not finite, at any depth."""
    if isinstance(value, str):
        return _NUMBERS.get(value, value)
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return value


def _fields(kind: type, document: Any, source: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise GpaError(f"{source} is {type(document).__name__}; expected an object")
    names = [each.name for each in fields(kind)]
    if missing := [name for name in names if name not in document]:
        raise GpaError(f"{source} has no {', '.join(map(repr, missing))}")
    if unknown := sorted(document.keys() - set(names)):
        raise GpaError(f"{source} has unknown keys {', '.join(map(repr, unknown))}")
    return {name: document[name] for name in names}


def _case(document: Any, source: str) -> CaseResult:
    values = _fields(CaseResult, document, source)
    for name in ("checks", "metrics", "seconds", "series", "tables"):
        values[name] = _numbers(values[name])
    try:
        values["checks"] = tuple(Check(**_fields(Check, check, f"{source}, check")) for check in values["checks"])
        return CaseResult(**values)
    except (TypeError, ValueError) as error:
        raise GpaError(f"{source}: {error}") from error
