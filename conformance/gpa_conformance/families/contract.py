"""Family "contract": what an Engine promises beside its logits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from gpa_conformance.cases import Case
from gpa_conformance.context import Context
from gpa_conformance.families import refusals, requests
from gpa_conformance.families.findings import Findings
from gpa_conformance.results import CaseResult

Kind = Callable[[Context, Case, Findings], Awaitable[None]]

KINDS: dict[str, Kind] = {
    "stop": requests.stop,
    "max-new-tokens": requests.max_new_tokens,
    "min-new-tokens": requests.min_new_tokens,
    "one-token": requests.one_token,
    "usage": requests.usage,
    "allowed": requests.allowed,
    "seed": requests.seed,
    "repeat": requests.repeat,
    "concurrent": requests.concurrent,
    "cancel": requests.cancel,
    "vocabulary": requests.vocabulary,
    "empty-prompt": refusals.empty_prompt,
    "out-of-range": refusals.out_of_range,
    "too-long": refusals.too_long,
    "close": refusals.close,
}


async def run(context: Context, case: Case) -> CaseResult:
    """Kinds: those of `KINDS`."""
    found = Findings(case)
    await KINDS[case.kind](context, case, found)
    return found.result()
