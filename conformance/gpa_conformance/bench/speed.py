"""`gpa-bench speed`: how long one answer takes, warm and alone; the figures of the Ascend report's benchmark.

results_benchmark.json (schema "gpa-bench-speed/1"), between the fields that `conditions` describes; seconds, bytes:

    settings        also iterations, new_tokens, warm_up, prompt
    prompt_tokens   length of the prompt; the same one for every iteration
    throughput_tokens_per_s     new tokens of all iterations over the sum of their latencies, so prefill included
    decode_tokens_per_s         tokens after each iteration's first over the time that they took; null for 1 new token
    latency_s       {mean, median, p99, min, max, count}: from submission until the last id is on the host
    first_token_s   the same of the time until the first id
    memory          {loaded, after}: when the engine had loaded, and after the last iteration (its peaks: since loading)
    samples         every iteration, in order: {new_tokens, latency_s, first_token_s, decode_s, cpu_s}

Answers are greedy over the whole vocabulary and cannot end early. Nothing is in flight when a clock stops: the last
id has been read by the host. p99 is defined in `summary.percentile`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gpa_codecs.errors import RequestError
from gpa_conformance.bench.conditions import Conditions, Outcome
from gpa_conformance.bench.process import ChildFailed
from gpa_conformance.bench.rounds import Progress
from gpa_conformance.bench.summary import Summary

SCHEMA = "gpa-bench-speed/1"

FILE_NAME = "results_benchmark.json"


@dataclass(frozen=True, slots=True)
class SpeedSettings:
    """iterations: that count; warm_up: that run before them. new_tokens: of each."""

    prompt: str
    iterations: int = 10
    new_tokens: int = 128
    warm_up: int = 2

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num-iters", self.iterations, 1),
            ("max-new-tokens", self.new_tokens, 1),
            ("warm-up", self.warm_up, 0),
        ):
            if value < least:
                raise RequestError(f"{name} is {value}; expected at least {least}")
        if not self.prompt:
            raise RequestError("the prompt is empty; expected at least one character")


def measure_speed(conditions: Conditions, settings: SpeedSettings, progress: Progress) -> Outcome:
    """Load, warm up, run all iterations. A failure of the engine is in the outcome; GpaError is for what was asked."""
    prompt = conditions.space.encode_text(settings.prompt)
    conditions.check_room(len(prompt), settings.new_tokens)
    facts: dict[str, Any] | None = None
    memory: dict[str, Any] = {"loaded": None, "after": None}
    samples: list[dict[str, Any]] = []
    failure = None
    try:
        with conditions.subject(len(prompt), settings.new_tokens) as child:
            progress(f"speed: loading {conditions.choice.spec.name}")
            facts = child.ask("load")
            memory["loaded"] = facts["memory"]
            for number in range(-settings.warm_up, settings.iterations):
                step = f"{number + 1} of {settings.iterations}" if number >= 0 else "warm-up"
                progress(f"speed: {step}")
                sample = child.ask("generate", prompt=prompt, new_tokens=settings.new_tokens)
                if number >= 0:
                    samples.append(sample)
            memory["after"] = child.ask("memory")
    except ChildFailed as failed:
        failure = failed
    figures = {"prompt_tokens": len(prompt), **speed_figures(samples), "memory": memory, "samples": samples}
    document = conditions.document(SCHEMA, asdict(settings), facts, failure, figures)
    if failure is None:
        return Outcome(document)
    return Outcome(document, [f"speed: {conditions.choice.spec.name}: {failure.reason}"], failure.traceback)


def speed_figures(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What the samples say; null where there are none."""
    latency = Summary.of([sample["latency_s"] for sample in samples])
    first = Summary.of([sample["first_token_s"] for sample in samples])
    decoded = sum(sample["new_tokens"] - 1 for sample in samples)
    return {
        "throughput_tokens_per_s": _rate(
            sum(sample["new_tokens"] for sample in samples), sum(sample["latency_s"] for sample in samples)
        ),
        "decode_tokens_per_s": _rate(decoded, sum(sample["decode_s"] for sample in samples)) if decoded else None,
        "latency_s": latency and latency.as_dict(),
        "first_token_s": first and first.as_dict(),
    }


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds > 0 else None
