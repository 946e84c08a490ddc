"""`gpa-bench engine` without its command line: check, start the children, run, gather."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpa_codecs.errors import RequestError
from gpa_conformance.bench.codec import KINDS, STAGES, CodecKind, Stage, StageResult
from gpa_conformance.bench.jobs import JOBS, Job
from gpa_conformance.bench.machine import LoadMeter, checkpoint_facts, machine_facts, memory, usable_cores
from gpa_conformance.bench.process import Child, ChildFailed
from gpa_conformance.bench.rounds import Progress, Record, run_rounds
from gpa_conformance.bench.workload import ContenderSpec, Workload, yardstick_dtype
from gpa_conformance.bench.yardstick import NAME, require_yardstick
from gpa_engines.checkpoint import PARTS, Checkpoint, Part
from gpa_engines.registry import BACKENDS, backend_status, check_options
from gpa_engines.speech.loading import open_model

REFERENCE = ("torch", "float32")
"""The contender whose logits on a CPU the others are compared with."""

BUSY_CORES = 0.2
"""Cores that others may keep busy before the report says so."""

IDLE_SHARE = 0.05
"""Share of a run's time that a waiting contender may use up before the report says so."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What `gpa-bench engine` was asked for.

    backends: names, or "name:dtype" for one that has dtypes of its own; the others run in each of `dtypes`. vs: the
    yardstick's name or None; vs_batches: the batches it runs too. codecs: kinds in which the codec is measured.
    timeout: seconds for one answer of a child. options: by backend, with "" for all of them.
    """

    model: str
    backends: tuple[str, ...] = ("torch",)
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "auto"
    threads: int = 2
    workload: Workload = field(default_factory=Workload)
    vs: str | None = None
    vs_batches: tuple[int, ...] = (1,)
    codecs: tuple[CodecKind, ...] = ("torch",)
    jobs: bool = False
    timeout: float = 900.0
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def yardstick_workload(self) -> Workload:
        """The yardstick has no restricted head, and runs only the batches that were asked of it."""
        return replace(self.workload, batches=self.vs_batches, heads=("full",))

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the checkpoint must hold."""
        return PARTS if "torch" in self.codecs or self.jobs else ("lm", "tokenizer")

    @property
    def contenders(self) -> list[tuple[str, str]]:
        """(backend, dtype) of every engine."""
        split = [backend.partition(":") for backend in self.backends]
        return [(name, own) for name, _, given in split for own in ((given,) if given else self.dtypes)]

    def options_of(self, backend: str) -> dict[str, Any]:
        """What it is created with beside dtype, device and threads."""
        return self.options.get("", {}) | self.options.get(backend, {})

    @property
    def codec_device(self) -> str:
        """The codec knows no "auto": it runs on the CPU unless a device is named."""
        return "cpu" if self.device == "auto" else self.device

    def check(self) -> None:
        """Raise GpaError for anything that can be known to be wrong before a model is loaded."""
        named = {backend for backend, _ in self.contenders}
        for backend in sorted(named):
            check_options(backend, self.options_of(backend))
        for backend in self.options:
            if backend and backend not in named:
                raise RequestError(
                    f"an option is for backend {backend!r}, which is not among those to measure: "
                    f"{', '.join(sorted(named))}"
                )
        for kind in self.codecs:
            if kind not in KINDS:
                raise RequestError(f"codec kind is {kind!r}; expected one of {', '.join(KINDS)}")
        if self.threads < 1:
            raise RequestError(f"threads is {self.threads}; expected at least 1")
        if not self.timeout > 0:
            raise RequestError(f"timeout is {self.timeout:g} s; expected more than 0")
        if self.vs is None:
            return
        if self.vs != NAME:
            raise RequestError(f"unknown yardstick {self.vs!r}; the only one is {NAME}")
        for batch in self.vs_batches:
            if batch not in self.workload.batches:
                raise RequestError(f"vs-batch {batch} is not among the batches {list(self.workload.batches)}")
        require_yardstick()


@dataclass(frozen=True, slots=True)
class JobResult:
    """One job of one contender: its figures, or why there are none."""

    job: Job
    spec: ContenderSpec
    figures: dict[str, Any] | None = None
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that was measured, every sample of it.

    foreign_cores: cores that other programs kept busy, on average, or None. records: the yardsticks first, then the
    engines.
    """

    settings: Settings
    created: str
    machine: dict[str, Any]
    checkpoint: dict[str, Any]
    foreign_cores: float | None
    records: list[Record]
    stages: list[StageResult]
    jobs: list[JobResult]
    notes: list[str]

    @property
    def failures(self) -> list[str]:
        """Each failure with what failed."""
        return [
            *(f"{record.spec.name}: {record.failed}" for record in self.records if record.failed),
            *(f"codec in {stage.kind}, {stage.stage}: {stage.failed}" for stage in self.stages if stage.failed),
            *(f"{job.job} with {job.spec.name}: {job.failed}" for job in self.jobs if job.failed),
        ]


def run_benchmark(settings: Settings, progress: Progress) -> Result:
    """Run all that the settings ask for. A contender, stage or job that fails is reported, and the others go on.

    Raises GpaError for what is wrong with the settings or the checkpoint. On any other end, Ctrl-C included, every
    child is ended.
    """
    settings.check()
    checkpoint = open_model(settings.model, require=settings.parts)
    settings.workload.check_context(checkpoint.config.max_position_embeddings)
    created, meter = datetime.now(UTC).isoformat(timespec="seconds"), LoadMeter.start()
    progress("fingerprint of the checkpoint")
    facts = checkpoint_facts(checkpoint)
    notes: list[str] = []
    records = _race(settings, checkpoint, notes, progress)
    stages = [result for stage in STAGES for result in _stage(settings, checkpoint, stage, progress)]
    engines = [record.spec for record in records if record.spec.kind == "engine" and not record.failed]
    jobs = [_job(settings, checkpoint, spec, job, progress) for spec in engines for job in JOBS if settings.jobs]
    foreign_cores = meter.foreign_cores()
    _note_conditions(settings, records, foreign_cores, notes)
    return Result(settings, created, machine_facts(), facts, foreign_cores, records, stages, jobs, notes)


def _race(settings: Settings, checkpoint: Checkpoint, notes: list[str], progress: Progress) -> list[Record]:
    vocab_size, semantic = checkpoint.config.vocab_size, checkpoint.token_space().semantic.range

    def start(spec: ContenderSpec, workload: Workload) -> Record:
        progress(f"loading {spec.name}")
        record = Record(spec, workload)
        values = {
            "spec": asdict(spec),
            "model": str(checkpoint.root),
            "workload": asdict(workload),
            "vocab_size": vocab_size,
            "semantic": (semantic.start, semantic.stop),
        }
        try:
            record.child = children.enter_context(_child(settings, "contender", values))
        except ChildFailed as failure:
            record.fail(failure)
        record.facts = record.ask("load")
        return record

    with tempfile.TemporaryDirectory(prefix="gpa-bench-") as scratch, ExitStack() as children:
        specs = [
            ContenderSpec("engine", backend, dtype, settings.device, settings.threads, settings.options_of(backend))
            for backend, dtype in settings.contenders
        ]
        engines = [start(spec, settings.workload) for spec in specs]
        yardsticks = [start(spec, settings.yardstick_workload) for spec in _yardsticks(settings, engines)]
        records = [*yardsticks, *engines]
        if _memory_is_short():
            notes.append("memory was short with all contenders loaded: run fewer side by side")
        run_rounds(records, settings.workload.repeats, progress)
        if settings.workload.logit_positions:
            _compare_logits(start, records, settings, Path(scratch) / "reference.npy", notes, progress)
    return records


def _yardsticks(settings: Settings, engines: Sequence[Record]) -> list[ContenderSpec]:
    """One per dtype that an engine is held against, on the device where the first engine runs."""
    infos = [record.facts["info"] for record in engines if record.facts]
    if settings.vs is None or not infos:
        return []
    dtypes = dict.fromkeys(yardstick_dtype(info["dtype"]) for info in infos)
    return [ContenderSpec("transformers", settings.vs, dtype, infos[0]["device"], settings.threads) for dtype in dtypes]


def _compare_logits(
    start: Callable[[ContenderSpec, Workload], Record],
    records: Sequence[Record],
    settings: Settings,
    saved: Path,
    notes: list[str],
    progress: Progress,
) -> None:
    """Hold every contender's logits against the reference's, which is started where it is not a contender itself."""
    status = backend_status(BACKENDS[REFERENCE[0]])
    if status.state != "ready":
        notes.append(f"no comparison of logits: the reference, torch in float32, {status.detail}: {status.remedy}")
        return
    positions = settings.workload.logit_positions
    reference = next((record for record in records if _is_reference(record)), None)
    if reference is None:
        reference = start(ContenderSpec("engine", *REFERENCE, "cpu", settings.threads), settings.workload)
    progress(f"logits: {reference.spec.name}")
    if reference.ask("write_logits", path=str(saved), positions=positions) is None:
        notes.append(f"no comparison of logits: the reference failed: {reference.failed}")
        return
    for record in records:
        if record.child is None:
            continue
        progress(f"logits: {record.spec.name}")
        record.logits = record.ask("compare_logits", path=str(saved), positions=positions) or None


def _is_reference(record: Record) -> bool:
    spec, facts = record.spec, record.facts
    same = (spec.backend, spec.dtype) == REFERENCE and facts is not None and facts["info"]["device"] == "cpu"
    return same and record.failed is None


def _stage(settings: Settings, checkpoint: Checkpoint, stage: Stage, progress: Progress) -> list[StageResult]:
    """One stage in every kind of codec; the warm calls take turns, so that what the machine does hits all alike."""
    cold: dict[CodecKind, dict[str, Any]] = {}
    warm: dict[CodecKind, list[dict[str, Any]]] = {kind: [] for kind in settings.codecs}
    failed: dict[CodecKind, str] = {}

    def ask(kind: CodecKind, call: str) -> dict[str, Any] | None:
        try:
            return children[kind].ask(call) if kind not in failed else None
        except ChildFailed as failure:
            failed[kind] = failure.reason
            return None

    with ExitStack() as stack:
        children: dict[CodecKind, Child] = {}
        for kind in settings.codecs:
            progress(f"codec in {kind}: {stage}")
            values = {
                "model": str(checkpoint.root),
                "stage": stage,
                "kind": kind,
                "device": settings.codec_device,
                "threads": settings.threads,
            }
            try:
                children[kind] = stack.enter_context(_child(settings, "codec", values))
            except ChildFailed as failure:
                failed[kind] = failure.reason
            if answer := ask(kind, "cold"):
                cold[kind] = answer
        for _ in range(settings.workload.repeats):
            for kind in settings.codecs:
                if answer := ask(kind, "warm"):
                    warm[kind].append(answer)
    return [
        StageResult(stage, kind, failed=failed[kind])
        if kind in failed
        else StageResult(stage, kind, cold[kind], tuple(warm[kind]))
        for kind in settings.codecs
    ]


def _job(settings: Settings, checkpoint: Checkpoint, spec: ContenderSpec, job: Job, progress: Progress) -> JobResult:
    progress(f"{job} with {spec.name}")
    values = {
        "model": str(checkpoint.root),
        "job": job,
        "backend": spec.backend,
        "dtype": spec.dtype,
        "device": spec.device,
        "threads": spec.threads,
        "options": spec.options,
    }
    try:
        with _child(settings, "job", values) as child:
            return JobResult(job, spec, child.ask("run"))
    except ChildFailed as failure:
        return JobResult(job, spec, failed=failure.reason)


def _child(settings: Settings, role: str, values: dict[str, Any]) -> Child:
    return Child(role, values, threads=settings.threads, timeout=settings.timeout)


def _memory_is_short() -> bool:
    available, total = memory("MemAvailable"), memory("MemTotal")
    return available is not None and total is not None and available < 0.1 * total


def _contention(threads: int, foreign_cores: float) -> str:
    """What others cost. OpenMP threads that wait for one that is not running make every parallel step a time slice
    long, which hits a program with many small steps many times harder than one with few: not even ratios survive."""
    busy = f"other programs kept {foreign_cores:.1f} of {usable_cores()} cores busy during the run"
    if threads > 1 and threads + foreign_cores > usable_cores() + BUSY_CORES:
        return f"{busy}: {threads} threads did not have a core each, so neither rates nor ratios count; run it alone"
    return f"{busy}: rates are low, ratios roughly hold"


def _note_conditions(
    settings: Settings, records: Sequence[Record], foreign_cores: float | None, notes: list[str]
) -> None:
    """Say what speaks against the figures."""
    if settings.threads > usable_cores():
        notes.append(f"{settings.threads} threads on {usable_cores()} usable cores")
    if foreign_cores is not None and foreign_cores > BUSY_CORES:
        notes.append(_contention(settings.threads, foreign_cores))
    for record in records:
        others = sum(s.wall_s for other in records if other is not record for s in other.samples)
        if record.idle_cpu_s > IDLE_SHARE * others > 0:
            notes.append(f"{record.spec.name} used {record.idle_cpu_s:.1f} CPU seconds while others were measured")
