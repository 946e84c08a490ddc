"""The child's side of the tasks that look at one engine: timed answers, logits, texts, memory."""

from __future__ import annotations

import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpa_codecs.errors import RequestError
from gpa_codecs.vocabulary import TokenSpace
from gpa_conformance.bench.contenders import EngineGenerator
from gpa_conformance.bench.resident import ResidentMemory, memory_facts
from gpa_conformance.bench.workload import MINIMUM_NEW_TOKENS, ContenderSpec, Workload
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.memory import MemoryMeter, MemoryReport
from gpa_engines.text import complete


class Subject:
    """Answers the parent's requests; every answer is a JSON object.

    prompt_tokens, new_tokens: the longest prompt and answer that will be asked for.
    """

    def __init__(self, spec: ContenderSpec, model: Path, prompt_tokens: int, new_tokens: int) -> None:
        self._spec = spec
        self._model = model
        self._workload = Workload(prompt_tokens, max(new_tokens, MINIMUM_NEW_TOKENS), (1,), ("full",), 1, prompt_tokens)
        self._generator: EngineGenerator | None = None

    def load(self) -> dict[str, Any]:
        """Load the engine: what it is, how long it took, what it holds now."""
        self._generator = EngineGenerator(self._spec, self._model, self._workload)
        return self._generator.facts | {"memory": self.memory()}

    def generate(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Continue `prompt` greedily by exactly `new_tokens` ids over the whole vocabulary; seconds.

        latency_s: from submission until the last id is on the host, so with whatever the device still had to do.
        first_token_s: until the first one. decode_s: from the first to the last. cpu_s: of all threads.
        """
        cpu = time.process_time()
        started, (trace,) = self._loaded.run([tuple(prompt)], new_tokens, None)
        return {
            "new_tokens": trace.tokens,
            "latency_s": trace.wall[-1] - started,
            "first_token_s": trace.wall[0] - started,
            "decode_s": trace.wall[-1] - trace.wall[0],
            "cpu_s": time.process_time() - cpu,
        }

    def complete(self, prompt: str, sampling: dict[str, Any]) -> dict[str, Any]:
        """Continue a text with text; an entry of results_text.json."""
        stream = complete(self._loaded.engine, self._space, prompt, **sampling)
        return self._loaded.wait(stream.drain).as_dict()

    def write_logits(self, prompt: list[int], path: str) -> dict[str, Any]:
        """Save the logits of a prompt as float32[T, V]."""
        logits = self._loaded.logits(tuple(prompt))
        if logits is None:
            raise RequestError(
                f"backend {self._spec.backend!r} gives no logits (capability 'logits'): nothing to compare"
            )
        temporary = f"{path}.part.npy"
        np.save(temporary, np.asarray(logits, np.float32))
        os.replace(temporary, path)
        return {"positions": len(logits)}

    def memory(self) -> dict[str, Any]:
        """Bytes, once the device has done what it was given."""
        return memory_facts(self._meter)

    def reset_peak(self) -> dict[str, Any]:
        """Let peaks start anew; whether they did."""
        host = ResidentMemory().reset_peak()
        return {"reset": self._meter.reset_peak() and host}

    def close(self) -> dict[str, Any]:
        """Free the engine; harmless before `load`."""
        if self._generator is not None:
            self._generator.close()
            self._generator = None
        return {}

    @property
    def _meter(self) -> MemoryMeter:
        engine = self._loaded.engine
        own = engine.memory_meter if isinstance(engine, MemoryReport) else None
        return ResidentMemory() if own is None else own

    @cached_property
    def _space(self) -> TokenSpace:
        return Checkpoint.open(self._model, require=("lm", "tokenizer")).token_space()

    @property
    def _loaded(self) -> EngineGenerator:
        if self._generator is None:
            raise RequestError("the engine is not loaded")
        return self._generator
