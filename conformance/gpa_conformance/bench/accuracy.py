"""`gpa-bench accuracy`: logits of the Ascend report's eight prompts against torch in float32 on the CPU.

results_accuracy.json (schema "gpa-bench-accuracy/1"), between the fields that `conditions` describes:

    settings        also baseline: a folder of `gpa-conformance baseline`, or null for torch in float32 on this CPU
    baseline        {kind "engine", engine: as above} or {kind "folder", path, document: its baseline.json}; or null
    limits          the report's four: {metric, relation, limit, source}
    prompts         a list: {case, text, ids, positions, last, all, verdicts}
    total           {last, all} over all prompts, or null where logits of a prompt are missing
    verdicts        the report's limits on the totals
    as_in_the_report    true if all of these verdicts hold
    judged_by       the limits that decide: those of the engine's dtype in gpa-conformance's limits.yaml, or "ascend"
                    for a dtype that has none there
    checks          these limits on all positions: {metric, value, relation, limit, passed, source}
    passed          true if all checks hold; false where anything is missing

`last` is about the last position of a prompt, which predicts the answer's first token and is what the report looks at;
`all` is about every position. Both hold the figures that `gpa_conformance.metrics` describes; null is "not a number",
which happens only where logits are NaN or infinite. A verdict is {scope "last" | "all", metric, value, relation,
limit, passed}; value null never passes. The report's limits know no dtype, and a healthy bfloat16 engine may be beyond
them, so they are said and do not decide.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpa_codecs.errors import GpaError
from gpa_conformance.baseline import Baseline, LogitsReference
from gpa_conformance.bench.conditions import Conditions, Outcome, loaded_engine
from gpa_conformance.bench.process import ChildFailed
from gpa_conformance.bench.prompts import ReportPrompt, report_prompts
from gpa_conformance.bench.rounds import Progress
from gpa_conformance.bench.workload import ContenderSpec
from gpa_conformance.limits import DtypeLimits, Limits, load_limits
from gpa_conformance.metrics import LogitsComparison, LogitsMetrics, merge
from gpa_conformance.prompts import ClipCodes, build_prompt
from gpa_conformance.results import Check
from gpa_engines.registry import require_backend

SCHEMA = "gpa-bench-accuracy/1"

FILE_NAME = "results_accuracy.json"

Scope = Literal["last", "all"]

COUNTS = frozenset(("positions", "non_finite", "top1_matches"))
"""Figures that are whole numbers."""


@dataclass(frozen=True, slots=True)
class AccuracySettings:
    """baseline: a folder of `gpa-conformance baseline`; None runs torch in float32 on this machine's CPU first."""

    baseline: str | None = None


def measure_accuracy(conditions: Conditions, settings: AccuracySettings, progress: Progress) -> Outcome:
    """Compare all prompts. What fails of the engines is in the outcome; GpaError is for what was asked."""
    prompts = report_prompts()
    ids = [conditions.space.encode_text(prompt.text) for prompt in prompts]
    with tempfile.TemporaryDirectory(prefix="gpa-bench-") as scratch:
        baseline: _FolderBaseline | _EngineBaseline
        if settings.baseline is None:
            baseline = _EngineBaseline(conditions, prompts, ids, Path(scratch) / "baseline")
        else:
            baseline = _FolderBaseline(settings.baseline, conditions, prompts)
        engine = _Answers(conditions.choice.spec, Path(scratch) / "engine")
        asked = [*baseline.asked, engine]
        for answers in asked:
            answers.write(conditions, ids, progress)
        progress("accuracy: comparing")
        files = [engine.file(number) for number in range(len(ids))]
        compared = [_compare(*each) for each in zip(baseline.references(), files, strict=True)]
    limits = load_limits()
    judge = limits.ascend if engine.facts is None else judge_of(limits, engine.facts["info"]["dtype"])
    figures = {"baseline": baseline.origin()} | accuracy_figures(prompts, ids, compared, limits.ascend, judge)
    failures = [answers.failure for answers in asked if answers.failure is not None]
    document = conditions.document(SCHEMA, asdict(settings), engine.facts, failures[0] if failures else None, figures)
    name = conditions.choice.spec.name
    if engine.facts is not None and judge is limits.ascend:
        dtype = engine.facts["info"]["dtype"]
        document["notes"].append(f"gpa-conformance has no limits for dtype {dtype}: the Ascend report's decide")
    lines = [f"accuracy: {answers.spec.name}: {answers.failure.reason}" for answers in asked if answers.failure]
    return Outcome(
        document,
        [*lines, *(f"accuracy: {name}: {miss}" for miss in misses(document))],
        "\n".join(failure.traceback for failure in failures),
    )


def accuracy_figures(
    prompts: Sequence[ReportPrompt],
    ids: Sequence[Sequence[int]],
    compared: Sequence[LogitsMetrics | None],
    limits: DtypeLimits,
    judge: DtypeLimits,
) -> dict[str, Any]:
    """The document's figures. compared: None where logits are missing. judge: the limits that decide."""
    rows = [
        {
            "case": prompt.case.id,
            "text": prompt.text,
            "ids": list(token_ids),
            "positions": len(token_ids),
            "last": None if metrics is None else _json(_last(metrics)),
            "all": None if metrics is None else _json(metrics),
            "verdicts": [] if metrics is None else _verdicts(limits, "last", _last(metrics)),
        }
        for prompt, token_ids, metrics in zip(prompts, ids, compared, strict=True)
    ]
    known = [metrics for metrics in compared if metrics is not None]
    total: dict[str, Any] = {"last": None, "all": None}
    verdicts: list[dict[str, Any]] = []
    checks: tuple[Check, ...] = ()
    if len(known) == len(compared):
        totals: dict[Scope, LogitsMetrics] = {"last": merge(map(_last, known)), "all": merge(known)}
        total = {scope: _json(metrics) for scope, metrics in totals.items()}
        verdicts = [verdict for scope, metrics in totals.items() for verdict in _verdicts(limits, scope, metrics)]
        checks = judge.checks(totals["all"].summary())
    return {
        "limits": [
            {"metric": each.metric, "relation": each.relation, "limit": each.value, "source": each.source}
            for each in limits.limits.values()
        ],
        "prompts": rows,
        "total": total,
        "verdicts": verdicts,
        "as_in_the_report": bool(verdicts) and all(verdict["passed"] for verdict in verdicts),
        "judged_by": judge.name,
        "checks": [asdict(check) | {"value": _finite(check.value)} for check in checks],
        "passed": bool(checks) and all(check.passed for check in checks),
    }


def misses(document: Mapping[str, Any]) -> list[str]:
    """A line for each check that does not hold."""
    return [
        f"{each['metric']} is {_shown(each['value'])}, expected {each['relation']} {each['limit']:g} "
        f"({document['judged_by']} limits, all positions)"
        for each in document["checks"]
        if not each["passed"]
    ]


def judge_of(limits: Limits, dtype: str) -> DtypeLimits:
    """The limits of a dtype, or the report's where it has none."""
    try:
        return limits.for_dtype(dtype)
    except GpaError:
        return limits.ascend


class _Answers:
    """Logits of one engine in files, and what is known of it. failure: why files are missing, or None."""

    def __init__(self, spec: ContenderSpec, folder: Path) -> None:
        folder.mkdir()
        self.spec = spec
        self.facts: dict[str, Any] | None = None
        self.failure: ChildFailed | None = None
        self._folder = folder

    def file(self, number: int) -> Path:
        """Where the logits of a prompt are, or would be: float32[T, V]."""
        return self._folder / f"{number}.npy"

    def write(self, conditions: Conditions, ids: Sequence[list[int]], progress: Progress) -> None:
        """Load the engine in a process of its own and let it write the logits of every prompt."""
        try:
            with conditions.subject(max(map(len, ids)), 1, self.spec) as child:
                progress(f"accuracy: loading {self.spec.name}")
                self.facts = child.ask("load")
                for number, prompt in enumerate(ids):
                    progress(f"accuracy: {self.spec.name}: {number + 1} of {len(ids)}")
                    child.ask("write_logits", prompt=prompt, path=str(self.file(number)))
        except ChildFailed as failure:
            self.failure = failure


class _EngineBaseline:
    """Torch in float32 on this machine's CPU."""

    def __init__(
        self, conditions: Conditions, prompts: Sequence[ReportPrompt], ids: Sequence[Sequence[int]], folder: Path
    ) -> None:
        require_backend("torch")
        self._answers = _Answers(ContenderSpec("engine", "torch", "float32", "cpu", conditions.choice.threads), folder)
        self._prompts = [build_prompt(prompt.case.spec["prompt"], conditions.space, _no_clip) for prompt in prompts]
        self._vocab_size = conditions.checkpoint.config.vocab_size
        self.asked = [self._answers]

    def references(self) -> list[LogitsReference]:
        return [
            LogitsReference(prompt, np.arange(len(prompt.ids)), self._vocab_size, "full", self._answers.file(number))
            for number, prompt in enumerate(self._prompts)
        ]

    def origin(self) -> dict[str, Any] | None:
        facts = self._answers.facts
        return None if facts is None else {"kind": "engine", "engine": loaded_engine(facts)}


class _FolderBaseline:
    """A folder that holds the same prompts of the same checkpoint. Raises GpaError where it does not."""

    asked: tuple[_Answers, ...] = ()

    def __init__(self, folder: str, conditions: Conditions, prompts: Sequence[ReportPrompt]) -> None:
        self._baseline = Baseline.open(folder)
        self._baseline.check_model(conditions.checkpoint)
        for prompt in prompts:
            if reason := self._baseline.missing(prompt.case):
                raise GpaError(f"baseline {folder} cannot serve {prompt.case.id}: {reason}")
        self._cases = [prompt.case.id for prompt in prompts]

    def references(self) -> list[LogitsReference]:
        return [self._baseline.logits(case) for case in self._cases]

    def origin(self) -> dict[str, Any]:
        return {"kind": "folder", "path": str(self._baseline.path), "document": dict(self._baseline.document)}


def _compare(reference: LogitsReference, file: Path) -> LogitsMetrics | None:
    """None where either side has no logits. Raises GpaError for logits of another shape."""
    if not (reference.file.is_file() and file.is_file()):
        return None
    logits = np.load(file, mmap_mode="r", allow_pickle=False)
    expected = (len(reference.prompt.ids), reference.vocab_size)
    if logits.shape != expected:
        raise GpaError(f"the engine's logits have shape {list(logits.shape)}; the baseline's are {list(expected)}")
    comparison = LogitsComparison(None)
    for block in reference.blocks():
        comparison.add(block, logits[block.positions])
    return comparison.result()


def _last(metrics: LogitsMetrics) -> LogitsMetrics:
    """The last position alone."""
    series = {name: values[-1:] for name, values in metrics.series.items()}
    return LogitsMetrics(metrics.positions[-1:], metrics.non_finite[-1:], series, metrics.inexact)


def _json(metrics: LogitsMetrics) -> dict[str, float | int | None]:
    return {name: int(value) if name in COUNTS else _finite(value) for name, value in metrics.summary().items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _verdicts(limits: DtypeLimits, scope: Scope, metrics: LogitsMetrics) -> list[dict[str, Any]]:
    return [
        {
            "scope": scope,
            "metric": check.metric,
            "value": _finite(check.value),
            "relation": check.relation,
            "limit": check.limit,
            "passed": check.passed,
        }
        for check in limits.checks(metrics.summary())
    ]


def _shown(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"


def _no_clip(name: str) -> ClipCodes:
    raise ValueError(f"a prompt of the Ascend report names the clip {name!r}; it is text alone")
