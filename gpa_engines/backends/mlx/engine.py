"""The MLX step model, and the engine made of it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, CheckpointError, RequestError
from gpa_engines.backends.mlx.attention import RowPlan, Span
from gpa_engines.backends.mlx.device import DEVICES, choose_device, choose_dtype
from gpa_engines.backends.mlx.head import Head
from gpa_engines.backends.mlx.kv_cache import KVCache
from gpa_engines.backends.mlx.linear import WeightFormat
from gpa_engines.backends.mlx.memory import MemoryLimits, device_memory
from gpa_engines.backends.mlx.model import Qwen3
from gpa_engines.backends.mlx.weights import WeightFolder, check_origin
from gpa_engines.engine import EngineInfo, check_ids
from gpa_engines.step_engine import CAPABILITIES, INVARIANT, StepEngine
from gpa_engines.step_model import CandidateSet, Slot, SlotRequest, StepInterrupted, StepRow


class MlxStepModel:
    """A :class:`~gpa_engines.step_model.StepModel` in MLX, whose weights are read by `load`.

    MLX's streams belong to a thread: `load` and `step` are called on the same one. On a CPU, where a step may take many
    seconds, it can be broken off after every layer; on a GPU a whole step is handed over at once.
    """

    def __init__(
        self,
        folder: WeightFolder,
        device: str,
        compute: mx.Dtype,
        *,
        max_tokens: int,
        max_batch: int,
        limits: MemoryLimits | None = None,
    ) -> None:
        config = folder.config
        self.vocab_size = config.vocab_size
        self.max_context = config.max_position_embeddings
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self.folder = folder
        self.device = DEVICES[device]
        self.format = WeightFormat(compute, folder.quantization, transposed=device == "cpu")
        self.limits = limits or MemoryLimits()
        self.interrupted = threading.Event()
        self.cache = KVCache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, max_tokens, compute)

    def load(self) -> None:
        """Read the weights. Raises CheckpointError for a file that changed since it was checked, or is unreadable."""
        self.limits.apply()
        try:
            with mx.stream(self.device):
                positions = min(self.max_tokens, self.max_context)
                self.model = Qwen3(self.folder.read(), self.folder.config, self.format, positions)
                self.head = Head(self.model.head_weight, self.format)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.folder.path}: MLX cannot load the weights: {error}") from error
        mx.clear_cache()

    def __del__(self) -> None:
        """Give the memory back: MLX would keep it for its next arrays."""
        self.__dict__.clear()
        mx.clear_cache()

    def allocate(self, request: SlotRequest) -> Slot | None:
        number = self.cache.allocate(request.positions)
        return None if number is None else Slot(number)

    def release(self, slot: int) -> None:
        self.cache.release(slot)

    def step(self, rows: Sequence[StepRow]) -> list[NDArray[np.float32] | None]:
        """See :class:`~gpa_engines.step_model.StepModel`. Raises RequestError for an id outside the vocabulary."""
        ids = [token for row in rows for token in row.ids]
        check_ids("ids", ids, self.vocab_size)
        positions = [at for row in rows for at in range(row.start, row.start + len(row.ids))]
        if max(positions) >= self.max_context:
            raise RequestError(f"position {max(positions)} is beyond the model's {self.max_context}")
        try:
            with mx.stream(self.device):
                plan = RowPlan(self.cache, [Span(row.slot, row.start, len(row.ids)) for row in rows])
                hidden = self.model.forward(mx.array(ids), mx.array(positions), plan, self._after_layer)
                groups = self._logits(rows, hidden)
                mx.eval([logits for _, logits in groups], [self.cache.arrays(row.slot) for row in rows])
        finally:
            self.interrupted.clear()
        return _sort_by_row(rows, groups)

    def interrupt(self) -> None:
        """See :class:`~gpa_engines.step_model.Interruptible`; between two steps it ends the next one early."""
        self.interrupted.set()

    def _after_layer(self, hidden: mx.array) -> None:
        if self.device == mx.cpu:
            mx.eval(hidden)
            if self.interrupted.is_set():
                raise StepInterrupted("the step was broken off between two layers")

    def _logits(self, rows: Sequence[StepRow], hidden: mx.array) -> list[tuple[list[int], mx.array]]:
        """The rows that want the same columns are multiplied together: (their numbers, float32[n, R])."""
        groups = dict[CandidateSet | None, list[int]]()
        for index, row in enumerate(rows):
            if row.logits != "none":
                groups.setdefault(row.candidates, []).append(index)
        starts = [0, *itertools.accumulate(len(row.ids) for row in rows)]
        result = []
        for wanted, members in groups.items():
            places = [starts[index] + offset for index in members for offset in _offsets(rows[index])]
            selected = hidden[mx.array(places)]
            normalized = self.model.normalize(selected, self.model.final_norm)
            result.append((members, self.head.logits(normalized, wanted)))
        return result


def build_engine(
    model_dir: str | Path,
    dtype: str,
    device: str,
    weights: str | Path | None,
    max_tokens_in_flight: int,
    max_batch: int,
    prefill_chunk: int,
    limits: MemoryLimits,
) -> StepEngine:
    """What :func:`gpa_engines.backends.mlx.create_engine` does, once MLX may be imported."""
    sizes = {"max_tokens_in_flight": max_tokens_in_flight, "max_batch": max_batch, "prefill_chunk": prefill_chunk}
    for name, value in sizes.items():
        if value < 1:
            raise BackendError(f"{name} is {value}; expected at least 1")
    chosen = choose_device(device)
    limits.check(chosen)
    folder = WeightFolder.open(model_dir if weights is None else weights)
    if weights is not None:
        check_origin(folder, Path(model_dir))
    dtype, compute = choose_dtype(dtype, chosen, folder)
    model = MlxStepModel(folder, chosen, compute, max_tokens=max_tokens_in_flight, max_batch=max_batch, limits=limits)
    info = EngineInfo(
        "mlx",
        chosen,
        dtype,
        model.vocab_size,
        model.max_context,
        INVARIANT if chosen == "cpu" else CAPABILITIES,
        tokenizer_sha256=folder.record.tokenizer_sha256 if folder.record else "",
    )
    return StepEngine(info, model, prefill_chunk=prefill_chunk, on_start=model.load, memory_meter=device_memory(chosen))


def _offsets(row: StepRow) -> Sequence[int]:
    return row.offsets if row.logits == "at" else (len(row.ids) - 1,)


def _sort_by_row(
    rows: Sequence[StepRow], groups: Sequence[tuple[list[int], mx.array]]
) -> list[NDArray[np.float32] | None]:
    """The groups' logits as arrays of NumPy's own, one entry per row of the step."""
    results: list[NDArray[np.float32] | None] = [None] * len(rows)
    for members, logits in groups:
        array = np.array(logits)
        at = 0
        for index in members:
            count = len(_offsets(rows[index]))
            results[index] = array[at : at + count] if rows[index].logits == "at" else array[at]
            at += count
    return results
