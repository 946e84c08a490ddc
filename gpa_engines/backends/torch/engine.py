"""The torch step model, and the engine made of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError
from gpa_engines.backends.torch.attention import AttentionPlan, PlanFactory, Span, usual_plans
from gpa_engines.backends.torch.cuda_graphs import CudaGraphs
from gpa_engines.backends.torch.device import Placement, choose_device, choose_dtype
from gpa_engines.backends.torch.head import Head
from gpa_engines.backends.torch.kv_cache import KVCache
from gpa_engines.backends.torch.linear import WeightFormat, weight_format
from gpa_engines.backends.torch.memory import device_memory
from gpa_engines.backends.torch.model import Qwen3
from gpa_engines.engine import EngineInfo
from gpa_engines.lm_config import LMConfig
from gpa_engines.passing_thread import in_passing_thread
from gpa_engines.step_engine import CAPABILITIES, INVARIANT, StepEngine
from gpa_engines.step_model import Slot, SlotRequest, StepRow


class TorchStepModel:
    """A :class:`~gpa_engines.step_model.StepModel` in torch.

    plans: how a step's attention is computed; None takes the device's usual way.
    """

    def __init__(
        self,
        folder: Path,
        config: LMConfig,
        weights: WeightFormat,
        *,
        max_tokens: int,
        max_batch: int,
        plans: PlanFactory | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self.vocab_size = config.vocab_size
        self.max_context = config.max_position_embeddings
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self.format = weights
        self.plans = plans or usual_plans(weights.device)
        self.model = Qwen3(folder, config, weights, min(max_tokens, self.max_context))
        self.head = Head(self.model.head_weight, weights)
        self.cache = KVCache(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            max_tokens,
            weights.compute,
            weights.device,
        )
        self.graphs = CudaGraphs(self.model, self.cache) if cuda_graphs else None

    def allocate(self, request: SlotRequest) -> Slot | None:
        number = self.cache.allocate(request.positions)
        return None if number is None else Slot(number)

    def release(self, slot: int) -> None:
        self.cache.release(slot)

    @torch.inference_mode()
    def step(self, rows: Sequence[StepRow]) -> list[NDArray[np.float32] | None]:
        """See :class:`~gpa_engines.step_model.StepModel`.

        Which kernel multiplies a row depends on that row alone, never on its neighbours.
        """
        results: list[NDArray[np.float32] | None] = [None] * len(rows)
        for wide in (False, True):
            members = [index for index, row in enumerate(rows) if self._is_wide(row) == wide]
            if members:
                outcome = self._forward([rows[index] for index in members], wide)
                for index, logits in zip(members, outcome, strict=True):
                    results[index] = logits
        return results

    def _is_wide(self, row: StepRow) -> bool:
        return self.format.wide_from is not None and len(row.ids) >= self.format.wide_from

    def _forward(self, rows: Sequence[StepRow], wide: bool) -> list[NDArray[np.float32] | None]:
        ids = [token for row in rows for token in row.ids]
        spans = [Span(self.cache.offset(row.slot), row.start, len(row.ids)) for row in rows]
        if self.graphs is not None and len(ids) == len(rows):
            return self._logits(rows, self.graphs.forward(ids, spans), wide)
        positions = [at for row in rows for at in range(row.start, row.start + len(row.ids))]
        padding = max(0, self.format.min_rows - len(ids))
        device = self.format.device
        hidden = self.model.forward(
            torch.tensor(ids + ids[-1:] * padding, device=device),
            torch.tensor(positions + positions[-1:] * padding, device=device),
            self._plan(spans, len(ids) + padding),
            wide=wide,
        )
        return self._logits(rows, hidden, wide)

    def _logits(self, rows: Sequence[StepRow], hidden: torch.Tensor, wide: bool) -> list[NDArray[np.float32] | None]:
        results: list[NDArray[np.float32] | None] = [None] * len(rows)
        ends = list(itertools.accumulate(len(row.ids) for row in rows))
        last = [index for index, row in enumerate(rows) if row.logits == "last"]
        if last:
            selected = hidden[[ends[index] - 1 for index in last]]
            normalized = self.model.normalize(selected, self.model.final_norm)
            logits = self.head.last_logits(normalized, [rows[index].candidates for index in last])
            for index, row_logits in zip(last, logits, strict=True):
                results[index] = row_logits
        for index, row in enumerate(rows):
            if row.logits == "at":
                start = ends[index] - len(row.ids)
                selected = hidden[[start + offset for offset in row.offsets]]
                normalized = self.model.normalize(selected, self.model.final_norm)
                results[index] = self.head.all_logits(normalized, row.candidates, wide=wide)
        return results

    def _plan(self, spans: Sequence[Span], rows: int) -> AttentionPlan:
        return self.plans(self.cache, spans, rows)


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """What a user sets of an engine's size, as `create_engine` explains it. Raises BackendError for a value below 1."""

    max_tokens_in_flight: int
    max_batch: int
    prefill_chunk: int
    threads: int | None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise BackendError(f"{name} is {value}; expected at least 1")


def build_engine(
    checkpoint_dir: str | Path,
    device: str,
    dtype: str,
    threads: int | None,
    max_tokens_in_flight: int,
    max_batch: int,
    prefill_chunk: int,
    cuda_graphs: bool,
) -> StepEngine:
    """What :func:`gpa_engines.backends.torch.create_engine` does, once torch may be imported."""
    sizes = EngineSizes(max_tokens_in_flight, max_batch, prefill_chunk, threads)
    chosen = choose_device(device)
    dtype = choose_dtype(dtype, chosen)
    if cuda_graphs and chosen.type != "cuda":
        raise BackendError(f"cuda_graphs needs a CUDA device; the device is {chosen.type!r}")
    return load_engine(Path(checkpoint_dir), Placement("torch", chosen, dtype), sizes, cuda_graphs=cuda_graphs)


def load_engine(folder: Path, placement: Placement, sizes: EngineSizes, *, cuda_graphs: bool = False) -> StepEngine:
    """Load a checkpoint's language model to where it is placed. Raises CheckpointError for a damaged checkpoint."""
    config = LMConfig.from_file(folder / "config.json")

    def enter() -> None:
        # torch counts threads per calling thread.
        if sizes.threads is not None:
            torch.set_num_threads(sizes.threads)
        if placement.enter is not None:
            placement.enter()

    def load() -> TorchStepModel:
        enter()
        model = TorchStepModel(
            folder,
            config,
            weight_format(placement.dtype, placement.device),
            max_tokens=sizes.max_tokens_in_flight,
            max_batch=sizes.max_batch,
            plans=placement.plans,
            cuda_graphs=cuda_graphs,
        )
        if config.tie_word_embeddings and placement.device.type != "cpu":
            model.head.check_tied()
        return model

    if sizes.threads is not None:
        torch.set_num_threads(sizes.threads)
    model = in_passing_thread(load)
    info = EngineInfo(
        placement.backend,
        str(placement.device),
        placement.dtype,
        config.vocab_size,
        model.max_context,
        INVARIANT if placement.device.type == "cpu" else CAPABILITIES,
        placement.note,
    )
    meter = device_memory(placement.device)
    return StepEngine(info, model, prefill_chunk=sizes.prefill_chunk, on_start=enter, memory_meter=meter)
