"""Factories of torch engines whose forward pass, head or cache has one fault, in prefill and in decoding alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpa_engines.backends.torch.engine import TorchStepModel
from gpa_engines.backends.torch.linear import weight_format
from gpa_engines.engine import EngineInfo
from gpa_engines.lm_config import LMConfig
from gpa_engines.scheduler import Job
from gpa_engines.step_engine import CAPABILITIES, INVARIANT, StepEngine
from gpa_engines.step_model import StepRow

CHUNK = 256
"""Prompt tokens per step, as the torch engine reads them."""

Rows = Sequence[StepRow]


def step_engine(model_dir: Path, dtype: str, alter: Callable[[TorchStepModel], object]) -> StepEngine:
    """The torch engine on a CPU, its step model altered before anything runs."""
    config = LMConfig.from_file(model_dir / "config.json")
    model = TorchStepModel(model_dir, config, weight_format(dtype, torch.device("cpu")), max_tokens=8192, max_batch=16)
    alter(model)
    info = EngineInfo("faulty", "cpu", dtype, config.vocab_size, model.max_context, INVARIANT)
    return StepEngine(info, model, prefill_chunk=CHUNK)


def untouched(model_dir: Path, *, dtype: str) -> StepEngine:
    return step_engine(model_dir, dtype, lambda model: None)


def all_positions_later(model_dir: Path, *, dtype: str) -> StepEngine:
    """No fault: rotary embeddings know only distances."""
    return step_engine(model_dir, dtype, lambda model: _turn_positions(model, lambda rows, at: at + 1))


def first_position_twice(model_dir: Path, *, dtype: str) -> StepEngine:
    """Positions 0, 0, 1, 2: off by one from the second id on."""
    return step_engine(model_dir, dtype, lambda model: _turn_positions(model, lambda rows, at: (at - 1).clamp(min=0)))


def decoding_one_later(model_dir: Path, *, dtype: str) -> StepEngine:
    """Prompts are right; what is decoded stands one position too late."""

    def later(rows: Rows, at: torch.Tensor) -> torch.Tensor:
        decoded = [index for index, row in enumerate(rows) if row.start and len(row.ids) == 1]
        starts = [0, *accumulate(len(row.ids) for row in rows)]
        at = at.clone()
        at[[starts[index] for index in decoded]] += 1
        # Rows of padding repeat the last row.
        at[starts[-1] :] = at[starts[-1] - 1]
        return at

    return step_engine(model_dir, dtype, lambda model: _turn_positions(model, later))


def chunk_one_later(model_dir: Path, *, dtype: str) -> StepEngine:
    """From the second chunk of a prompt on, every position is one too far."""

    def later(rows: Rows, at: torch.Tensor) -> torch.Tensor:
        return torch.where(at >= CHUNK, at + 1, at)

    return step_engine(model_dir, dtype, lambda model: _turn_positions(model, later))


def chunk_loses_an_id(model_dir: Path, *, dtype: str) -> StepEngine:
    """The first id of every further chunk of a prompt is read as the one after it."""

    def alter(model: TorchStepModel) -> None:
        step = model.step

        def lossy(rows: Rows) -> list[NDArray[np.float32] | None]:
            return step([_with_ids(row, (*row.ids[1:2], *row.ids[1:])) if _continues(row) else row for row in rows])

        model.step = lossy

    return step_engine(model_dir, dtype, alter)


def attention_sharper(model_dir: Path, *, dtype: str) -> StepEngine:
    """Attention's scores times 1.1."""

    def alter(model: TorchStepModel) -> None:
        for layer in model.model.layers:
            layer.head_norm[: model.model.config.num_attention_heads].mul_(1.1)

    return step_engine(model_dir, dtype, alter)


def sees_the_future(model_dir: Path, *, dtype: str) -> StepEngine:
    """Every position of a prompt's chunk sees the next one as well."""

    def alter(model: TorchStepModel) -> None:
        make = model._plan

        def plan(spans: Any, rows: int) -> Any:
            made: Any = make(spans, rows)
            made.masks = [
                None if mask is None else torch.ones_like(mask).tril_(span.start + 1)
                for span, mask in zip(spans, made.masks, strict=True)
            ]
            return made

        model._plan = plan

    return step_engine(model_dir, dtype, alter)


def logits_scaled(model_dir: Path, *, dtype: str) -> StepEngine:
    return step_engine(model_dir, dtype, lambda model: _turn_logits(model, lambda rows: rows * np.float32(1.5)))


def logits_shifted(model_dir: Path, *, dtype: str) -> StepEngine:
    return step_engine(model_dir, dtype, lambda model: _turn_logits(model, lambda rows: rows + np.float32(3.0)))


def log_probabilities(model_dir: Path, *, dtype: str) -> StepEngine:
    return step_engine(model_dir, dtype, lambda model: _turn_logits(model, _log_softmax))


def probabilities(model_dir: Path, *, dtype: str) -> StepEngine:
    return step_engine(model_dir, dtype, lambda model: _turn_logits(model, lambda rows: np.exp(_log_softmax(rows))))


def one_column_wrong(model_dir: Path, *, dtype: str) -> StepEngine:
    """One id of the whole vocabulary is impossible, say because its row of the output matrix was cut off."""

    def spoil(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = rows.copy()
        rows[:, -1] = -1e4
        return rows

    return step_engine(model_dir, dtype, lambda model: _turn_logits(model, spoil))


def neighbours_leak(model_dir: Path, *, dtype: str) -> StepEngine:
    """Of rows that share a step each gets a twentieth of the one before it."""

    def alter(model: TorchStepModel) -> None:
        make = model._logits

        def logits(rows: Rows, hidden: torch.Tensor, wide: bool) -> list[NDArray[np.float32] | None]:
            return make(rows, hidden + 0.05 * hidden.roll(1, 0) if len(rows) > 1 else hidden, wide)

        model._logits = logits

    return step_engine(model_dir, dtype, alter)


def company_rounds(model_dir: Path, *, dtype: str) -> StepEngine:
    """Of rows that share a step all hidden values move by up to 1.5%, as if the batch changed a sum of bfloat16."""

    def alter(model: TorchStepModel) -> None:
        make = model._logits

        def logits(rows: Rows, hidden: torch.Tensor, wide: bool) -> list[NDArray[np.float32] | None]:
            noise = torch.rand(hidden.shape[-1], generator=torch.Generator().manual_seed(len(rows)))
            rounded = hidden * (1 + 0.03 * (noise - 0.5)).to(hidden.dtype)
            return make(rows, rounded if len(rows) > 1 else hidden, wide)

        model._logits = logits

    return step_engine(model_dir, dtype, alter)


def company_rounds_as_declared(model_dir: Path, *, dtype: str) -> StepEngine:
    return _without_promise(company_rounds(model_dir, dtype=dtype))


def neighbours_leak_without_promise(model_dir: Path, *, dtype: str) -> StepEngine:
    return _without_promise(neighbours_leak(model_dir, dtype=dtype))


def slot_keeps_its_start(model_dir: Path, *, dtype: str) -> StepEngine:
    """Where a request's cache lies on an earlier one's, the first keys and values of that one stay."""

    def alter(model: TorchStepModel) -> None:
        forward = model._forward
        used: set[int] = set()

        def stale(rows: Rows, wide: bool) -> list[NDArray[np.float32] | None]:
            starts = [model.cache.offset(row.slot) for row in rows if row.start == 0]
            pools = (model.cache.keys, model.cache.values)
            kept = [(at, [pool[:, :, at : at + 4].clone() for pool in pools]) for at in starts if at in used]
            used.update(starts)
            results = forward(rows, wide)
            for at, old in kept:
                for pool, values in zip(pools, old, strict=True):
                    pool[:, :, at : at + 4] = values
            return results

        model._forward = stale

    return step_engine(model_dir, dtype, alter)


def _without_promise(engine: StepEngine) -> StepEngine:
    engine._info = replace(engine.info, capabilities=CAPABILITIES)
    return engine


def cancel_leaks(model_dir: Path, *, dtype: str) -> StepEngine:
    """A cancelled request ends, but its part of the cache is never given back."""
    engine = untouched(model_dir, dtype=dtype)
    scheduler = engine._scheduler

    def cancel(job: Job) -> None:
        def drop() -> None:
            if not job.ended:
                job.ended = True
                (scheduler.waiting if job.slot is None else scheduler.running).remove(job)

        scheduler.post(drop)

    scheduler.cancel = cancel
    return engine


def cancel_does_nothing(model_dir: Path, *, dtype: str) -> StepEngine:
    """A cancelled request runs on to its end, in the way of the others."""
    engine = untouched(model_dir, dtype=dtype)
    engine._scheduler.cancel = lambda job: None
    return engine


def _turn_positions(model: TorchStepModel, turn: Callable[[Rows, torch.Tensor], torch.Tensor]) -> None:
    """Rotate by other positions; where keys and values lie, and what is seen, stays right."""
    run, forward = model._forward, model.model.forward
    running: list[Rows] = []

    def run_rows(rows: Rows, wide: bool) -> list[NDArray[np.float32] | None]:
        running[:] = [rows]
        return run(rows, wide)

    def turned(ids: torch.Tensor, positions: torch.Tensor, plan: Any, *, wide: bool = False) -> torch.Tensor:
        return forward(ids, turn(running[0], positions), plan, wide=wide)

    model._forward = run_rows
    model.model.forward = turned


def _turn_logits(model: TorchStepModel, turn: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
    make = model.head.all_logits
    model.head.all_logits = lambda *given, **options: turn(make(*given, **options))


def _log_softmax(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    wide = rows.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return (wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))).astype(np.float32)


def _continues(row: StepRow) -> bool:
    return row.start > 0 and row.start % CHUNK == 0 and len(row.ids) > 1


def _with_ids(row: StepRow, ids: Sequence[int]) -> StepRow:
    return replace(row, ids=ids)
