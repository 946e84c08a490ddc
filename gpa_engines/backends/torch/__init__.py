"""The torch backend: CPU, CUDA and Apple MPS."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpa_engines.step_engine import StepEngine


def create_engine(
    checkpoint_dir: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    max_tokens_in_flight: int = 8192,
    max_batch: int = 16,
    prefill_chunk: int = 256,
    cuda_graphs: bool = False,
) -> StepEngine:
    """Load the language model of a checkpoint folder.

    device: "auto" (cuda, then mps, then cpu), "cpu", "cuda", "cuda:N" or "mps".
    dtype: "auto" (float32 on a CPU, bfloat16 elsewhere), "float32", "bfloat16", "float16" or "int8" (weights only).
    threads: torch's threads; this setting is the whole process's. None leaves it alone.
    max_tokens_in_flight: positions of prompt and answer that all running requests together may hold; in float32 one
        costs 224 KiB at the released size, in the other dtypes half, taken when first used.
    max_batch: requests that run at a time; more wait in order.
    prefill_chunk: prompt tokens read per step, while running requests go on.
    cuda_graphs: replay decode steps as CUDA graphs; only on CUDA, and not verified on hardware yet.
    Raises BackendError for a value or device that cannot be had, CheckpointError for a damaged checkpoint.
    """
    from gpa_engines.backends.torch.engine import build_engine

    return build_engine(
        checkpoint_dir, device, dtype, threads, max_tokens_in_flight, max_batch, prefill_chunk, cuda_graphs
    )
