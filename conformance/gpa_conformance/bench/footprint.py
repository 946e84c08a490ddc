"""`gpa-bench memory`: what the engine holds once loaded, after prompts of growing length, and after decoding.

results_memory.json (schema "gpa-bench-memory/1"), between the fields that `conditions` describes; seconds, bytes:

    settings        also prefill (lengths in tokens), new_tokens
    stages          in the order in which they ran, each on top of what came before: {stage "load" | "prefill" |
                    "decode", prompt_tokens, new_tokens, seconds, memory, peak_since "stage" | "start"}

Stages: load; each prompt with one new token; the longest prompt again with new_tokens. peak_since says what the peaks
in `memory` cover: the stage itself where they can be set back (CUDA and NPU allocators, Linux), else the whole run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from gpa_codecs.errors import RequestError
from gpa_conformance.bench.conditions import Conditions, Outcome
from gpa_conformance.bench.process import Child, ChildFailed
from gpa_conformance.bench.rounds import Progress
from gpa_conformance.bench.workload import prompts

SCHEMA = "gpa-bench-memory/1"

FILE_NAME = "results_memory.json"


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """prefill: lengths of the prompts in tokens, made ascending. new_tokens: decoded after the longest."""

    prefill: tuple[int, ...] = (128, 512, 2048)
    new_tokens: int = 128

    def __post_init__(self) -> None:
        for name, value in (*(("prefill", length) for length in self.prefill), ("max-new-tokens", self.new_tokens)):
            if value < 1:
                raise RequestError(f"{name} is {value}; expected at least 1")
        if not self.prefill:
            raise RequestError("there is no prefill length; expected at least one")
        object.__setattr__(self, "prefill", tuple(sorted(set(self.prefill))))


def measure_memory(conditions: Conditions, settings: MemorySettings, progress: Progress) -> Outcome:
    """Run all stages in one process. A failure of the engine is in the outcome; GpaError is for what was asked."""
    longest = settings.prefill[-1]
    conditions.check_room(longest, settings.new_tokens)
    facts: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = []
    failure = None
    try:
        with conditions.subject(longest, settings.new_tokens) as child:
            progress(f"memory: loading {conditions.choice.spec.name}")
            facts = child.ask("load")
            stages.append(_entry("load", 0, 0, facts["import_s"] + facts["load_s"], facts["memory"], "start"))
            for length in settings.prefill:
                progress(f"memory: prefill of {length} tokens")
                stages.append(_stage(child, conditions, "prefill", length, 1))
            progress(f"memory: decoding {settings.new_tokens} tokens")
            stages.append(_stage(child, conditions, "decode", longest, settings.new_tokens))
    except ChildFailed as failed:
        failure = failed
    document = conditions.document(SCHEMA, asdict(settings), facts, failure, {"stages": stages})
    if failure is None:
        return Outcome(document)
    return Outcome(document, [f"memory: {conditions.choice.spec.name}: {failure.reason}"], failure.traceback)


def _stage(
    child: Child, conditions: Conditions, stage: Literal["prefill", "decode"], prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """One request. Every stage has a prompt of its own, so that no prefix cache answers for the model."""
    seed = prompt_tokens if stage == "prefill" else 0
    (prompt,) = prompts(seed, 1, prompt_tokens, conditions.checkpoint.config.vocab_size)
    since = "stage" if child.ask("reset_peak")["reset"] else "start"
    sample = child.ask("generate", prompt=list(prompt), new_tokens=new_tokens)
    return _entry(stage, prompt_tokens, new_tokens, sample["latency_s"], child.ask("memory"), since)


def _entry(
    stage: str, prompt_tokens: int, new_tokens: int, seconds: float, memory: dict[str, Any], since: str
) -> dict[str, Any]:
    return {
        "stage": stage,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "seconds": seconds,
        "memory": memory,
        "peak_since": since,
    }
