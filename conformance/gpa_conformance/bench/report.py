"""The JSON document of `gpa-bench engine`.

Seconds, bytes and tokens throughout; a *spread* is {"median", "min", "max", "count"}; null is "not measured".

    format, version    "gpa-bench-engine", 1
    created            start of the run, ISO 8601 in UTC
    settings           what was asked for: model, backends, dtypes, device, threads, workload {prompt_tokens,
                       new_tokens, batches, heads, repeats, logit_positions}, vs, vs_batches, codecs, jobs, timeout
    machine            cpu, cores, usable_cores, memory, system, python, packages {name: version or null},
                       foreign_cores: cores that other programs kept busy during the run, on average
    checkpoint         path, lm_bytes: size of the language model's weights, sha256 {file: hash}
    contenders         a list, the yardsticks first:
        name, kind     "torch/int8"; "engine" or "transformers"
        backend, dtype, device, threads         as asked for
        failed         null, or why it left the race; what was measured before stays
        info           what the engine says of itself (EngineInfo); options: what it was created with
        import_s, load_s                        importing the framework; from then until ready
        peak_rss       {loaded, batch_N ..., race}: largest resident set until loaded, until the last measurement with
                       batches up to N, and of all measurements; without the comparison of logits
        idle_cpu_s     CPU time that it used while it was not asked anything
        measurements   a list: {kind "prefill" | "decode", batch, head "full" | "restricted", tokens_per_s: spread,
                       cpu_s_per_token: spread, ratio: spread or null, against: name or null, scaling: spread or null}
                       ratio: times the yardstick's tokens/s (same batch, full head), scaling: times those of batch 1
                       (same head), both taken within each round
        samples        every sample: {round, kind, batch, head, tokens, wall_s, cpu_s, tokens_per_s, peak_rss}
        logits         {rel_l2, worst_rel_l2, top1_agreement, positions} against torch float32 on the CPU, or null
    codec              a list: {stage "semantic" | "glm" | "voice" | "decode", kind "torch" | "onnx", failed, audio_s,
                       open_s, load_s, wall_s: spread, cpu_s: spread, wall_s_per_audio_s, cpu_s_per_audio_s, speed_up:
                       spread or null, peak_rss, cold, warm}
                       load_s: the first call less a warm one; cold, warm: the samples {wall_s, cpu_s, peak_rss};
                       speed_up: how many times faster than torch, round by round
    jobs               a list: {job "tts-a" | "stt", name, failed, load_s, task_s, cpu_s, audio_s, prompt_tokens,
                       new_tokens, peak_rss_loaded, peak_rss}, each from a fresh process
    notes              what speaks against the figures, in words

How speed is measured: prefill is prompt tokens over the time from submission to the first token; decode is the rate
while all requests of a batch decode at once (see `timing.decode_rate`).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from gpa_conformance.bench.benchmark import JobResult, Result
from gpa_conformance.bench.codec import CLIP_SECONDS, StageResult
from gpa_conformance.bench.rounds import Record, Sample, Spread, ratios, scaling
from gpa_conformance.bench.workload import Measurement, yardstick_dtype

FORMAT, VERSION = "gpa-bench-engine", 1


def document(result: Result) -> dict[str, Any]:
    """The whole run as JSON values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": result.created,
        "settings": asdict(result.settings),
        "machine": result.machine | {"foreign_cores": result.foreign_cores},
        "checkpoint": result.checkpoint,
        "contenders": [_contender(record, yardstick_of(record, result.records)) for record in result.records],
        "codec": [_stage(stage, result.stages) for stage in result.stages],
        "jobs": [_job(job) for job in result.jobs],
        "notes": result.notes,
    }


def encode(values: dict[str, Any]) -> bytes:
    """UTF-8 JSON, strictly: no NaN, no infinity."""
    return (json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def yardstick_of(record: Record, records: list[Record]) -> Record | None:
    """The yardstick that an engine is held against: by the dtype that the engine says it runs in."""
    if record.spec.kind != "engine" or record.facts is None:
        return None
    dtype = yardstick_dtype(record.facts["info"]["dtype"])
    return next((each for each in records if each.spec.kind != "engine" and each.spec.dtype == dtype), None)


def peaks(record: Record) -> dict[str, int]:
    """Peak memory in bytes: loaded, batch_N up to each batch size in the first round, race: all rounds."""
    if record.facts is None:
        return {}
    known = {"loaded": record.facts["peak_rss"]}
    for batch in record.workload.batches:
        until = [s.peak_rss for s in record.samples if s.round == 0 and s.measurement.batch <= batch]
        if until:
            known[f"batch_{batch}"] = max(until)
    if record.samples:
        known["race"] = max(sample.peak_rss for sample in record.samples)
    return known


def _contender(record: Record, yardstick: Record | None) -> dict[str, Any]:
    facts = record.facts or {}
    return {
        "name": record.spec.name,
        **asdict(record.spec),
        "failed": record.failed,
        "info": facts.get("info"),
        "options": facts.get("options"),
        "import_s": facts.get("import_s"),
        "load_s": facts.get("load_s"),
        "peak_rss": peaks(record),
        "idle_cpu_s": record.idle_cpu_s,
        "measurements": [_measurement(record, each, yardstick) for each in record.workload.measurements()],
        "samples": [_sample(sample) for sample in record.samples],
        "logits": record.logits,
    }


def _measurement(record: Record, measurement: Measurement, yardstick: Record | None) -> dict[str, Any]:
    samples = [sample for sample in record.samples if sample.measurement == measurement]
    ratio = ratios(record, measurement, yardstick) if yardstick else None
    return {
        **asdict(measurement),
        "tokens_per_s": _spread(Spread.of(sample.tokens_per_s for sample in samples)),
        "cpu_s_per_token": _spread(Spread.of(sample.cpu_s_per_token for sample in samples)),
        "ratio": _spread(ratio),
        "against": yardstick.spec.name if yardstick and ratio else None,
        "scaling": _spread(scaling(record, measurement)),
    }


def _sample(sample: Sample) -> dict[str, Any]:
    values = asdict(sample)
    return {"round": values.pop("round"), **values.pop("measurement"), **values}


def _spread(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    return {"median": spread.median, "min": spread.minimum, "max": spread.maximum, "count": spread.count}


def _stage(stage: StageResult, stages: list[StageResult]) -> dict[str, Any]:
    torch = next((each for each in stages if each.stage == stage.stage and each.kind == "torch"), stage)
    pairs = [] if torch is stage else zip(torch.warm, stage.warm, strict=False)
    wall = Spread.of(sample["wall_s"] for sample in stage.warm)
    cpu = Spread.of(sample["cpu_s"] for sample in stage.warm)
    return {
        "stage": stage.stage,
        "kind": stage.kind,
        "failed": stage.failed,
        "audio_s": CLIP_SECONDS,
        "open_s": stage.cold["open_s"] if stage.cold else None,
        "load_s": max(0.0, stage.cold["wall_s"] - wall.median) if stage.cold and wall else None,
        "wall_s": _spread(wall),
        "cpu_s": _spread(cpu),
        "wall_s_per_audio_s": wall.median / CLIP_SECONDS if wall else None,
        "cpu_s_per_audio_s": cpu.median / CLIP_SECONDS if cpu else None,
        "speed_up": _spread(Spread.of(theirs["wall_s"] / ours["wall_s"] for theirs, ours in pairs)),
        "peak_rss": stage.peak_rss,
        "cold": stage.cold,
        "warm": list(stage.warm),
    }


def _job(job: JobResult) -> dict[str, Any]:
    figures = ("load_s", "task_s", "cpu_s", "audio_s", "prompt_tokens", "new_tokens", "peak_rss_loaded", "peak_rss")
    measured = job.figures or dict.fromkeys(figures)
    return {"job": job.job, "name": job.spec.name, "failed": job.failed, **measured}
