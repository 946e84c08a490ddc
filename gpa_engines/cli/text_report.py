"""results_text.json: what was generated from which prompt, and everything needed to repeat it.

Times are in seconds; fields may be added under the same schema name, not changed or removed.

    schema          "gpa-text/1"
    created         start of the run, ISO 8601 in UTC
    model           as asked for; model_dir: the folder that it is in; random_weights: true if the weights are random
    engine          backend, device, dtype, vocab_size, max_context, capabilities, note: what the engine says of itself
    options         what the engine was created with
    sampling        what every prompt was asked for (the fields of SamplingParams), the seed apart
    machine         cores, system, python; gpa-bench adds cpu, usable_cores, memory, packages, foreign_cores
    versions        of this package, Python and the libraries that shape the result
    timings         load: creating the engine
    results         a list, one entry per prompt: prompt, text (without the prompt), finish_reason "stop" | "length",
                    prompt_ids, ids, prompt_tokens, new_tokens, seed (also where none was given), timings {queue,
                    prefill, decode, total}
    failed          null, or why prompts are missing from the results
    warnings        a list of texts
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpa_engines.engine import EngineInfo, SamplingParams

SCHEMA = "gpa-text/1"

FILE_NAME = "results_text.json"


def text_document(
    *,
    created: str,
    model: str,
    model_dir: Path,
    random_weights: bool,
    engine: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    sampling: SamplingParams,
    machine: Mapping[str, Any],
    versions: Mapping[str, str | None],
    load: float | None,
    results: Sequence[Mapping[str, Any]],
    failed: str | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """The document; engine and load are None where the engine could not be created."""
    settings = asdict(sampling)
    del settings["seed"]
    return {
        "schema": SCHEMA,
        "created": created,
        "model": model,
        "model_dir": str(model_dir),
        "random_weights": random_weights,
        "engine": None if engine is None else dict(engine),
        "options": dict(options),
        "sampling": settings,
        "machine": dict(machine),
        "versions": dict(versions),
        "timings": {"load": load},
        "results": [dict(result) for result in results],
        "failed": failed,
        "warnings": list(warnings),
    }


def engine_facts(info: EngineInfo) -> dict[str, Any]:
    """EngineInfo as JSON values."""
    return asdict(info) | {"capabilities": sorted(info.capabilities)}


def machine_basics() -> dict[str, Any]:
    """What the standard library knows of this machine."""
    return {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
