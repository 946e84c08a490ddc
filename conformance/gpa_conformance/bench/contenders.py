"""The child's side of a benchmark: an engine behind the few calls that the rounds make."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import RequestError
from gpa_conformance.bench.timing import Timed, Trace, decode_rate, lead, peak_rss
from gpa_conformance.bench.workload import ContenderSpec, Head, Measurement, Workload, prompts
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams
from gpa_engines.registry import backend_options, create_engine, require_backend

T = TypeVar("T")

DECODE_ATTEMPTS = 6
"""Doublings of the answers' length before a batch that never decodes together is given up."""


class Generator(Protocol):
    """What can be raced: loads itself when made, continues a batch of prompts greedily, gives logits."""

    @property
    def facts(self) -> dict[str, Any]:
        """What loaded, and how long it took: info, import_s, load_s."""
        ...

    def run(self, batch: list[tuple[int, ...]], new_tokens: int, allowed: range | None) -> tuple[float, list[Trace]]:
        """Continue all prompts at once by exactly `new_tokens` ids; the moment of submission and a trace of each."""
        ...

    def logits(self, ids: tuple[int, ...]) -> NDArray[np.float32] | None:
        """float32[T, V], or None where the contender cannot give them."""
        ...

    def close(self) -> None: ...


class EngineGenerator:
    """An engine of the registry, through the Engine protocol only."""

    def __init__(self, spec: ContenderSpec, model: Path, workload: Workload) -> None:
        started = time.perf_counter()
        for package in require_backend(spec.backend).packages:
            import_module(package)
        known = backend_options(spec.backend)
        imported = time.perf_counter()
        wanted = {"device": spec.device, "threads": spec.threads} | _room(workload, known)
        options = {name: value for name, value in wanted.items() if name in known} | spec.options
        self._runner = asyncio.Runner()
        self._engine: Engine = create_engine(spec.backend, model, dtype=spec.dtype, **options)
        loaded = time.perf_counter()
        info = self._engine.info
        self._capabilities = info.capabilities
        self.facts = {
            "info": {
                "backend": info.backend,
                "device": info.device,
                "dtype": info.dtype,
                "vocab_size": info.vocab_size,
                "max_context": info.max_context,
                "capabilities": sorted(info.capabilities),
                "note": info.note,
            },
            "options": options | {"dtype": spec.dtype},
            "import_s": imported - started,
            "load_s": loaded - imported,
        }

    def run(self, batch: list[tuple[int, ...]], new_tokens: int, allowed: range | None) -> tuple[float, list[Trace]]:
        sampling = SamplingParams(temperature=0.0, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        ranges = None if allowed is None else (allowed,)
        requests = [GenerationRequest(prompt, sampling, allowed=ranges) for prompt in batch]
        return self._runner.run(self._run(requests))

    async def _run(self, requests: list[GenerationRequest]) -> tuple[float, list[Trace]]:
        started = time.perf_counter()
        return started, await asyncio.gather(*(self._follow(request) for request in requests))

    async def _follow(self, request: GenerationRequest) -> Trace:
        trace = Trace()
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                if delta.ids:
                    trace.add(len(delta.ids))
                if delta.usage is not None and trace.tokens:
                    trace.settle(delta.usage.decode)
        wanted = request.sampling.max_new_tokens
        if trace.tokens != wanted:
            raise RequestError(f"asked for {wanted} tokens, the engine gave {trace.tokens}")
        return trace

    def logits(self, ids: tuple[int, ...]) -> NDArray[np.float32] | None:
        if "logits" not in self._capabilities:
            return None
        return self.wait(lambda: self._engine.logits(ids))

    def close(self) -> None:
        self.wait(self._engine.close)
        self._runner.close()

    @property
    def engine(self) -> Engine:
        """The engine itself; its coroutines run in `wait`."""
        return self._engine

    def wait(self, call: Callable[[], Awaitable[T]]) -> T:
        """What a coroutine of the engine returns."""

        async def awaited() -> T:
            return await call()

        return self._runner.run(awaited())


class Contender:
    """Answers the parent's requests; every answer is a JSON object."""

    def __init__(self, spec: ContenderSpec, model: Path, workload: Workload, vocab_size: int, semantic: range) -> None:
        self._spec = spec
        self._model = model
        self._workload = workload
        self._vocab_size = vocab_size
        self._semantic = semantic
        self._generator: Generator | None = None
        self._leads: dict[int, int] = {}

    def load(self) -> dict[str, Any]:
        """Load the model; how long that took and what it is."""
        if self._spec.kind == "transformers":
            from gpa_conformance.bench.yardstick import TransformersGenerator

            self._generator = TransformersGenerator(self._spec, self._model)
        else:
            self._generator = EngineGenerator(self._spec, self._model, self._workload)
        return self._generator.facts | {"peak_rss": peak_rss()}

    def warm_up(self) -> dict[str, Any]:
        """Run every measurement once; finds out how much longer a batch's answers must be for all to overlap."""
        self._prefill(0)
        for batch in self._workload.batches:
            first, *others = self._workload.heads
            self._leads[batch] = lead(self._traces(Measurement("decode", batch, first), 0))
            for head in others:
                self._traces(Measurement("decode", batch, head), 0, prompt_tokens=1)
        return {"leads": [self._leads[batch] for batch in self._workload.batches]}

    def measure(self, kind: Literal["prefill", "decode"], batch: int, head: Head, seed: int) -> dict[str, Any]:
        """One sample of one measurement."""
        timed = self._prefill(seed) if kind == "prefill" else self._decode(Measurement(kind, batch, head), seed)
        return timed.as_dict() | {"peak_rss": peak_rss()}

    def _decode(self, measurement: Measurement, seed: int) -> Timed:
        """The rate of a batch; answers that were too short to overlap are asked for again, longer from then on."""
        for _ in range(DECODE_ATTEMPTS):
            extra = self._leads[measurement.batch]
            traces = self._traces(measurement, seed, extra=extra)
            timed = decode_rate(traces)
            if timed is not None:
                return timed
            self._leads[measurement.batch] = max(lead(traces), 2 * extra + self._workload.new_tokens)
        raise RequestError(f"{measurement.batch} requests never decode all at once: raise --new-tokens")

    def _prefill(self, seed: int) -> Timed:
        """From submission to the first token of one prompt."""
        batch = prompts(seed, 1, self._workload.prompt_tokens, self._vocab_size)
        cpu = time.process_time()
        started, (trace,) = self._loaded.run(batch, 1, None)
        wall, tokens = trace.wall[0] - started, len(batch[0])
        return Timed(tokens, wall, trace.cpu[0] - cpu, tokens / wall)

    def _traces(
        self, measurement: Measurement, seed: int, *, extra: int = 0, prompt_tokens: int | None = None
    ) -> list[Trace]:
        length = prompt_tokens or self._workload.prompt_tokens
        batch = prompts(seed, measurement.batch, length, self._vocab_size)
        allowed = self._semantic if measurement.head == "restricted" else None
        return self._loaded.run(batch, self._workload.new_tokens + extra, allowed)[1]

    def write_logits(self, path: str, positions: int) -> dict[str, Any]:
        """Save the logits of the shared prompt as float32[T, V] for the others to compare with."""
        logits = self._logits(positions)
        if logits is None:
            return {"written": False}
        temporary = f"{path}.part.npy"
        np.save(temporary, logits)
        os.replace(temporary, path)
        return {"written": True}

    def compare_logits(self, path: str, positions: int) -> dict[str, Any]:
        """Distance of this contender's logits from the saved ones; {} where it gives none."""
        logits = self._logits(positions)
        return {} if logits is None else logit_distance(logits, np.load(path, mmap_mode="r"))

    def _logits(self, positions: int) -> NDArray[np.float32] | None:
        return self._loaded.logits(prompts(0, 1, positions, self._vocab_size)[0])

    def close(self) -> dict[str, Any]:
        """Free the model; harmless before `load`."""
        if self._generator is not None:
            self._generator.close()
            self._generator = None
        return {}

    @property
    def _loaded(self) -> Generator:
        if self._generator is None:
            raise RequestError("the contender is not loaded")
        return self._generator


def logit_distance(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, Any]:
    """rel_l2 = ||x - ref|| / ||ref|| over all positions in float64, the worst position's, and top-1 agreement.

    logits, reference: float32[T, V]. Raises RequestError for another shape and for values that are not finite, so
    that a NaN never scores well.
    """
    if logits.shape != reference.shape:
        raise RequestError(f"logits have shape {logits.shape}, the reference {reference.shape}")
    squares, differences, agreed = [], [], 0
    for row, expected in zip(logits, reference, strict=True):
        x, ref = row.astype(np.float64), expected.astype(np.float64)
        if not (np.isfinite(x).all() and np.isfinite(ref).all()):
            raise RequestError("the logits hold NaN or infinity")
        squares.append(float(ref @ ref))
        differences.append(float((x - ref) @ (x - ref)))
        agreed += int(x.argmax() == ref.argmax())
    return {
        "rel_l2": float(np.sqrt(sum(differences) / sum(squares))),
        "worst_rel_l2": float(np.sqrt(np.max(np.array(differences) / np.array(squares)))),
        "top1_agreement": agreed / len(squares),
        "positions": len(squares),
    }


def _room(workload: Workload, known: dict[str, Parameter]) -> dict[str, int]:
    """Limits of the engine that are too small for the workload, raised; an answer may be twice as long as asked for,
    so that the requests of a batch overlap."""
    rows = max(workload.batches)
    positions = max(rows * (workload.prompt_tokens + 2 * workload.new_tokens), workload.logit_positions)
    needed = {"max_batch": rows, "max_tokens_in_flight": positions}
    return {name: value for name, value in needed.items() if name in known and value > known[name].default}
