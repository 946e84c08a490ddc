"""`gpa-bench full`: accuracy, speed, memory and texts of one engine, each task in processes of its own.

eval_results.json (schema "gpa-bench-full/1"):

    schema, created, settings   as in every document (see `conditions`); settings without the tasks' own options
    passed          true if every task was done and the logits are within the limits of their dtype
    failures        what failed, a line each
    accuracy, benchmark, memory, text    the documents of the tasks, as their own files hold them

The documents are also written beside it: results_accuracy.json, results_benchmark.json, results_memory.json and
results_text.json.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gpa_conformance.bench import accuracy, footprint, speed
from gpa_conformance.bench.accuracy import AccuracySettings, measure_accuracy
from gpa_conformance.bench.conditions import Conditions, Outcome
from gpa_conformance.bench.footprint import MemorySettings, measure_memory
from gpa_conformance.bench.prompts import report_prompts
from gpa_conformance.bench.rounds import Progress
from gpa_conformance.bench.speed import SpeedSettings, measure_speed
from gpa_conformance.bench.texts import write_texts
from gpa_engines.cli import text_report
from gpa_engines.engine import SamplingParams

SCHEMA = "gpa-bench-full/1"

FILE_NAME = "eval_results.json"

PARTS = {
    "accuracy": accuracy.FILE_NAME,
    "benchmark": speed.FILE_NAME,
    "memory": footprint.FILE_NAME,
    "text": text_report.FILE_NAME,
}
"""Key in the document -> file beside it."""


def evaluate(
    conditions: Conditions,
    accuracy_settings: AccuracySettings,
    speed_settings: SpeedSettings,
    memory_settings: MemorySettings,
    progress: Progress,
) -> Outcome:
    """All four tasks; one that fails leaves the others running. Texts are greedy and as long as speed's answers."""
    texts = [prompt.text for prompt in report_prompts()]
    sampling = SamplingParams(max_new_tokens=speed_settings.new_tokens)
    outcomes = {
        "accuracy": measure_accuracy(conditions, accuracy_settings, progress),
        "benchmark": measure_speed(conditions, speed_settings, progress),
        "memory": measure_memory(conditions, memory_settings, progress),
        "text": write_texts(conditions, texts, sampling, progress),
    }
    failures = [failure for outcome in outcomes.values() for failure in outcome.failures]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "created": conditions.created,
        "settings": asdict(conditions.choice),
        "passed": not failures,
        "failures": failures,
        **{key: outcome.document for key, outcome in outcomes.items()},
    }
    tracebacks = "\n".join(outcome.traceback for outcome in outcomes.values() if outcome.traceback)
    return Outcome(document, failures, tracebacks)
