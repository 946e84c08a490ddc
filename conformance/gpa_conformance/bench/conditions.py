"""One engine under one set of conditions: which engine, on which checkpoint and machine, and its child process.

Every document of a task begins with the same fields:

    schema          name of the layout; fields may be added under the same name, not changed or removed
    created         start of the run, ISO 8601 in UTC
    failed          null, or why figures are missing; what was measured before stays
    settings        what was asked for: model, backend, dtype, device, threads, timeout, options of the backend, and the
                    task's own
    engine          what loaded, or null: info {backend, device, dtype, vocab_size, max_context, capabilities, note},
                    options it was created with, import_s (its framework), load_s (from then until ready)
    machine         cpu, cores, usable_cores, memory, system, python, packages {name: version or null}, foreign_cores:
                    cores that other programs kept busy during the run, on average, or null
    checkpoint      path, random_weights, lm_bytes: size of the language model's weight files, sha256 {file: hash} of
                    the language model's and the tokenizer's files

and ends with `notes`: what speaks against the figures, in words. Memory, in bytes with null for unknown, is

    {source, allocated, reserved, peak_allocated, peak_reserved, host_resident, host_peak_resident}

where source says who counts (the device's allocator, or on a CPU the process's resident set: allocated is its private
part, reserved all of it) and host_* is the resident set of the engine's process in any case.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from gpa_codecs.errors import RequestError
from gpa_codecs.vocabulary import TokenSpace
from gpa_conformance.bench.benchmark import BUSY_CORES
from gpa_conformance.bench.machine import LoadMeter, machine_facts, package_version, usable_cores
from gpa_conformance.bench.process import Child, ChildFailed
from gpa_conformance.bench.rounds import Progress
from gpa_conformance.bench.workload import ContenderSpec
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.random_checkpoint import is_random_checkpoint
from gpa_engines.registry import BACKENDS, check_options
from gpa_engines.speech.loading import open_model


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine that a command line names. timeout: seconds for one answer of its process. options: of the backend."""

    model: str
    backend: str = "torch"
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 2
    timeout: float = 900.0
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise GpaError for what can be known to be wrong before a model is loaded."""
        check_options(self.backend, self.options)
        if self.threads < 1:
            raise RequestError(f"threads is {self.threads}; expected at least 1")
        if not self.timeout > 0:
            raise RequestError(f"timeout is {self.timeout:g} s; expected more than 0")

    @property
    def spec(self) -> ContenderSpec:
        return ContenderSpec("engine", self.backend, self.dtype, self.device, self.threads, self.options)


@dataclass(slots=True)
class Outcome:
    """A task's document, and what of it failed: each a line for the user. traceback: of the engine's process, or ""."""

    document: dict[str, Any]
    failures: list[str] = field(default_factory=list)
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What holds for all figures of a command."""

    choice: EngineChoice
    checkpoint: Checkpoint
    space: TokenSpace
    created: str
    meter: LoadMeter

    @classmethod
    def begin(cls, choice: EngineChoice, progress: Progress) -> Conditions:
        """Check the choice and open the checkpoint, of which only language model and tokenizer are needed."""
        choice.check()
        checkpoint = open_model(choice.model, require=("lm", "tokenizer"))
        space = checkpoint.token_space()
        created, meter = datetime.now(UTC).isoformat(timespec="seconds"), LoadMeter.start()
        progress("fingerprint of the checkpoint")
        checkpoint.fingerprint()  # kept by the process; reading the files now also warms the page cache
        return cls(choice, checkpoint, space, created, meter)

    @contextmanager
    def subject(
        self, prompt_tokens: int, new_tokens: int, spec: ContenderSpec | None = None
    ) -> Generator[Child, None, None]:
        """The engine's process, which has still to be asked to load; `spec` runs another engine than the chosen one."""
        spec = spec or self.choice.spec
        settings = {
            "spec": asdict(spec),
            "model": str(self.checkpoint.root),
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
        }
        with Child("subject", settings, threads=spec.threads, timeout=self.choice.timeout) as child:
            yield child

    def check_room(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise RequestError for a request beyond the model's context."""
        needed, limit = prompt_tokens + new_tokens, self.checkpoint.config.max_position_embeddings
        if needed > limit:
            raise RequestError(
                f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones need {needed} positions; "
                f"the model has {limit}"
            )

    def document(
        self,
        schema: str,
        settings: Mapping[str, Any],
        engine: Mapping[str, Any] | None,
        failure: ChildFailed | None,
        figures: Mapping[str, Any],
    ) -> dict[str, Any]:
        """A task's document; settings: the task's own. engine: what loading answered, None if it never did."""
        foreign_cores = self.meter.foreign_cores()
        notes = []
        if self.choice.threads > usable_cores():
            notes.append(f"{self.choice.threads} threads on {usable_cores()} usable cores")
        if foreign_cores is not None and foreign_cores > BUSY_CORES:
            notes.append(f"other programs kept {foreign_cores:.1f} cores busy during the run: timings are too long")
        return {
            "schema": schema,
            "created": self.created,
            "failed": None if failure is None else failure.reason,
            "settings": asdict(self.choice) | dict(settings),
            "engine": None if engine is None else loaded_engine(engine),
            "machine": self.machine() | {"foreign_cores": foreign_cores},
            "checkpoint": {
                "path": str(self.checkpoint.root),
                "random_weights": is_random_checkpoint(self.checkpoint.root),
                "lm_bytes": self.lm_bytes,
                "sha256": self.checkpoint.fingerprint(),
            },
            **figures,
            "notes": notes,
        }

    @property
    def lm_bytes(self) -> int:
        """Size of the language model's weight files."""
        return sum(file.stat().st_size for file in self.checkpoint.root.glob("*.safetensors"))

    def machine(self) -> dict[str, Any]:
        """`machine_facts`, with the versions of what the backend needs."""
        facts = machine_facts()
        needed = {name: package_version(name) for name in BACKENDS[self.choice.backend].packages}
        return facts | {"packages": facts["packages"] | needed}


def loaded_engine(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The field `engine` of a document, from what loading answered."""
    return {name: facts[name] for name in ("info", "options", "import_s", "load_s")}
