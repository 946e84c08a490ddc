"""The yardstick: transformers' own Qwen3 and `generate`, as a user of transformers would run them.

The only module of the benchmark that imports a framework, and only inside the child that plays the yardstick.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, RequestError
from gpa_conformance.bench.timing import Trace
from gpa_conformance.bench.workload import ContenderSpec

NAME = "transformers"

PACKAGES = ("torch", "transformers")


def require_yardstick() -> None:
    """Raise BackendError saying how to install what the yardstick needs."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise BackendError(f"--vs {NAME} needs {' and '.join(missing)}: pip install 'gpa-engines[dev]'")


class TransformersGenerator:
    """Qwen3ForCausalLM.generate: greedy, with its cache, end-of-sequence off so that every answer has full length."""

    def __init__(self, spec: ContenderSpec, model: Path) -> None:
        started = time.perf_counter()
        import torch
        import transformers

        # transformers imports a model's code when its class is first asked for.
        qwen3: Any = transformers.Qwen3ForCausalLM
        imported = time.perf_counter()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(spec.threads)
        dtype = getattr(torch, spec.dtype)
        loaded: Any = qwen3.from_pretrained(model, dtype=dtype, local_files_only=True)
        self._model = loaded.to(spec.device).eval()
        # The checkpoint's own generation settings would sample, penalise or stop early.
        self._model.generation_config = transformers.GenerationConfig(do_sample=False, use_cache=True)
        self._torch = torch
        self._device = spec.device
        self.facts = {
            "info": {
                "backend": NAME,
                "device": spec.device,
                "dtype": spec.dtype,
                "vocab_size": int(loaded.config.vocab_size),
                "max_context": int(loaded.config.max_position_embeddings),
                "capabilities": ["logits"],
                "note": f"transformers {transformers.__version__}, {loaded.config._attn_implementation} attention",
            },
            "options": {"dtype": spec.dtype, "device": spec.device, "threads": spec.threads},
            "import_s": imported - started,
            "load_s": time.perf_counter() - imported,
        }

    def run(self, batch: list[tuple[int, ...]], new_tokens: int, allowed: range | None) -> tuple[float, list[Trace]]:
        if allowed is not None:
            raise RequestError("transformers has no restricted head")
        ids = self._torch.tensor(batch, device=self._device)
        steps = _Steps()
        started = time.perf_counter()
        answer = self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            max_new_tokens=new_tokens,
            pad_token_id=0,
            streamer=steps,
        )
        if answer.shape[1] != ids.shape[1] + new_tokens or steps.trace.tokens != new_tokens:
            raise RequestError(f"asked for {new_tokens} tokens, transformers gave {answer.shape[1] - ids.shape[1]}")
        return started, [steps.trace] * len(batch)

    def logits(self, ids: tuple[int, ...]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            output: Any = self._model(self._torch.tensor([ids], device=self._device), use_cache=False)
        return output.logits[0].float().cpu().numpy()

    def close(self) -> None:
        del self._model


class _Steps:
    """A streamer in transformers' sense: `put` gets the prompt first, then the new id of every row at each step."""

    def __init__(self) -> None:
        self.trace = Trace()
        self._prompt_seen = False

    def put(self, _ids: Any) -> None:
        if self._prompt_seen:
            self.trace.add(1)
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""
