"""Family "long": positions beyond 4,096, with the kinds of the families "logits" and "generate"."""

from __future__ import annotations

from gpa_codecs.errors import CapacityError
from gpa_conformance.cases import Case
from gpa_conformance.context import Context, Skip
from gpa_conformance.families.generate import run_greedy
from gpa_conformance.families.logits import run_prefill
from gpa_conformance.results import CaseResult


async def run(context: Context, case: Case) -> CaseResult:
    """Kinds: "prefill", "greedy". Skips what is beyond the engine's context or cache."""
    needed = len(context.prompt(case.id).ids) + int(case.spec.get("new_tokens", 0))
    if needed > context.engine.info.max_context:
        raise Skip(f"it needs {needed} positions; the engine has {context.engine.info.max_context}")
    try:
        if case.kind == "prefill":
            context.need("logits")
            return await run_prefill(context, case)
        return await run_greedy(context, case)
    except CapacityError as error:
        raise Skip(f"the engine has no room for it: {error}") from error
