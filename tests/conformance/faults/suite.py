"""The suite run on an engine of this process, by the real runner, on the tiny checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpa_codecs.codec import SpeechCodec
from gpa_conformance.baseline import Baseline
from gpa_conformance.cases import load_cases, select
from gpa_conformance.limits import load_limits
from gpa_conformance.results import CaseResult, RunReport
from gpa_conformance.runner import run_cases
from gpa_conformance.session import Setup
from gpa_conformance.target import Target
from gpa_engines.checkpoint import Checkpoint

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Suite:
    """What every run needs; the baseline holds all cases."""

    checkpoint: Checkpoint
    baseline: Baseline
    make_codec: Callable[[], SpeechCodec]

    def run(self, target: Target, cases: str | None, *, seed: int = 0) -> RunReport:
        """Carry out the cases that `cases` selects. seed: added to the seeds of sampled cases."""
        packaged = load_cases()
        setup = Setup(
            target=target,
            baseline=self.baseline,
            limits=load_limits(),
            cases={case.id: case for case in packaged},
            space=self.checkpoint.token_space(),
            make_codec=self.make_codec,
            isolate=False,
            seed=seed,
        )
        return asyncio.run(run_cases(setup, self.checkpoint, select(packaged, cases)))

    def healthy(self, dtype: str) -> Target:
        return Target("backend", "torch", self.checkpoint.root, {"dtype": dtype, "threads": 1})

    def planted(self, factory: str, dtype: str) -> Target:
        """The engine of a factory of this folder: "module:name"."""
        return Target("factory", f"tests.conformance.faults.{factory}", self.checkpoint.root, {"dtype": dtype})

    def misread(self, altered: Path, dtype: str) -> Target:
        """The torch engine on an altered copy of the checkpoint, as if it misread the right one."""
        return Target("backend", "torch", altered, {"dtype": dtype, "threads": 1})


@dataclass(frozen=True, slots=True)
class Fault:
    """caught_by: cases that must each fail, comma-separated. metric: how a failed check of the first begins, or one of
    several by dtype ("a|b"). says: words of its reason."""

    name: str
    caught_by: str
    metric: str
    says: str = ""

    def __str__(self) -> str:
        return self.name


def expect_caught(report: RunReport, fault: Fault) -> None:
    """Every case that is named has failed, and the first for the reason that is."""
    missed = [case.case for case in report.cases if not case.failed]
    assert not missed, f"{fault.name} was not seen by {', '.join(missed)}: {[_figures(c) for c in report.cases]}"
    assert report.exit_code == 1
    first = result(report, fault.caught_by.split(",")[0])
    if fault.metric:
        moved = {check.metric for check in first.failed_checks}
        assert any(metric.startswith(tuple(fault.metric.split("|"))) for metric in moved), f"{moved}: {first.reason}"
    assert fault.says in first.reason, first.reason


def result(report: RunReport, case: str) -> CaseResult:
    """Of one case."""
    return next(each for each in report.cases if each.case == case)


def _figures(case: CaseResult) -> dict[str, float]:
    return {check.metric: check.value for check in case.checks}
