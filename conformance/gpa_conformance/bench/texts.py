"""The text task of `gpa-bench full`: a continuation of each prompt, as `gpa-run --task text` writes it.

results_text.json has the layout (schema "gpa-text/1") that `gpa_engines.cli.text_report` describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gpa_conformance.bench.conditions import Conditions, Outcome
from gpa_conformance.bench.process import ChildFailed
from gpa_conformance.bench.rounds import Progress
from gpa_engines.cli.text_report import text_document
from gpa_engines.engine import SamplingParams
from gpa_engines.random_checkpoint import is_random_checkpoint


def write_texts(
    conditions: Conditions, prompts: Sequence[str], sampling: SamplingParams, progress: Progress
) -> Outcome:
    """Continue every prompt, one after the other. A failure of the engine is in the outcome."""
    longest = max(len(conditions.space.encode_text(prompt)) for prompt in prompts)
    conditions.check_room(longest, sampling.max_new_tokens)
    facts: dict[str, Any] | None = None
    results: list[dict[str, Any]] = []
    failure = None
    try:
        with conditions.subject(longest, sampling.max_new_tokens) as child:
            progress(f"text: loading {conditions.choice.spec.name}")
            facts = child.ask("load")
            for number, prompt in enumerate(prompts, 1):
                progress(f"text: {number} of {len(prompts)}")
                results.append(child.ask("complete", prompt=prompt, sampling=asdict(sampling)))
    except ChildFailed as failed:
        failure = failed
    machine = conditions.machine()
    document = text_document(
        created=conditions.created,
        model=conditions.choice.model,
        model_dir=conditions.checkpoint.root,
        random_weights=is_random_checkpoint(conditions.checkpoint.root),
        engine=None if facts is None else facts["info"],
        options=facts["options"] if facts else {},
        sampling=sampling,
        machine=machine | {"foreign_cores": conditions.meter.foreign_cores()},
        versions=machine["packages"] | {"python": machine["python"]},
        load=None if facts is None else facts["load_s"],
        results=results,
        failed=None if failure is None else failure.reason,
    )
    if failure is None:
        return Outcome(document)
    return Outcome(document, [f"text: {conditions.choice.spec.name}: {failure.reason}"], failure.traceback)
