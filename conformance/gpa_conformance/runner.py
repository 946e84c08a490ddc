"""A whole run: every chosen case once, and the report with everything that is needed to repeat it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from gpa_conformance.bench.machine import machine_facts
from gpa_conformance.cases import Case
from gpa_conformance.results import CaseResult, RunReport
from gpa_conformance.session import Session, Setup
from gpa_engines.checkpoint import Checkpoint

Progress = Callable[[Case, CaseResult | None, int, int], None]
"""Called before a case with None and after it with its result; then how many are done and how many there are."""


async def run_cases(
    setup: Setup,
    checkpoint: Checkpoint,
    cases: Sequence[Case],
    *,
    command: Sequence[str] = (),
    progress: Progress | None = None,
    on_interrupt: Callable[[RunReport], None] | None = None,
) -> RunReport:
    """Open the engine, carry out the cases in their order, and report. Raises GpaError if the engine cannot be opened.

    command: the command line, for the report. on_interrupt: given the report of the cases that had ended, if there are
    any, when the run is cancelled; the cancellation goes on after it.
    """
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    tell = progress or (lambda case, result, done, total: None)
    results: list[CaseResult] = []

    def report(session: Session) -> RunReport:
        facts = machine_facts()
        return RunReport(
            engine=_engine_facts(session),
            target=str(setup.target),
            model={
                "name": checkpoint.root.resolve().name,
                "vocab_size": checkpoint.config.vocab_size,
                "files": checkpoint.fingerprint(),
                **_speech_facts(session, cases),
            },
            baseline=_baseline_facts(setup),
            versions={"python": facts.pop("python"), **facts.pop("packages")},
            machine=facts,
            seeds={
                "offset": setup.seed,
                "cases": {case.id: case.spec["seed"] for case in cases if "seed" in case.spec},
            },
            command=tuple(command),
            started=started,
            seconds=time.monotonic() - clock,
            cases=tuple(results),
            digests={case.id: case.digest for case in cases},
        )

    async with Session(setup) as session:
        try:
            for done, case in enumerate(cases):
                tell(case, None, done, len(cases))
                results.append(await session.run(case))
                tell(case, results[-1], done + 1, len(cases))
        except asyncio.CancelledError:
            if on_interrupt is not None and results:
                on_interrupt(report(session))
            raise
        return report(session)


def _engine_facts(session: Session) -> dict[str, Any]:
    info = session.info
    return asdict(info) | {
        "capabilities": sorted(info.capabilities),
        "options": dict(session.setup.target.options),
        "isolated": session.setup.isolate,
        "limits": session.limits.name,
    }


def _speech_facts(session: Session, cases: Sequence[Case]) -> dict[str, str]:
    """What the family "speech" was judged by, in words, if it ran."""
    if session.speech is None or not any(case.family == "speech" for case in cases):
        return {}
    domain, items = session.speech.domain, session.speech.items
    recogniser, reason = session.speech.recogniser
    listener = recogniser.name if recogniser is not None else reason
    of = f"{len(items)} of {len(domain.utterances)} held-out utterances"
    return {"speech": f"{of}, {len(domain.words)} words of {domain.language!r}; {listener}"}


def _baseline_facts(setup: Setup) -> dict[str, Any]:
    document: Mapping[str, Any] = setup.baseline.document
    made = document["made"]
    return {
        "path": str(setup.baseline.path),
        "made_by": f"{made['engine']['backend']} {made['engine']['dtype']} on {made['engine']['device']}",
        "started": made["started"],
        "versions": made["machine"]["packages"],
        "files": document["model"]["files"],
        "checksum": document["checksum"],
    }
