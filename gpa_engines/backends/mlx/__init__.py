"""The MLX backend: Metal on Apple silicon, and the CPU there and on Linux, by the same code.

What was run: everything on Linux' CPU (mlx 0.32, `mlx[cpu]`), where every row's result is the same to the last bit
whatever rows are beside it. Nothing was run on a Mac yet.

On Linux MLX is there to prove parity, not for speed: it computes on one thread, and its wheel brings the reference
BLAS. Preloading OpenBLAS (`LD_PRELOAD=.../libopenblas.so.0`) makes a float32 prefill some fifteen times faster; a row
then depends on its neighbours in rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpa_engines.step_engine import StepEngine


def create_engine(
    model_dir: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    weights: str | Path | None = None,
    max_tokens_in_flight: int = 8192,
    max_batch: int = 16,
    prefill_chunk: int = 256,
    memory_limit: int | None = None,
    cache_limit: int | None = None,
    wired_limit: int | None = None,
) -> StepEngine:
    """Load the language model of a checkpoint folder, or of one that tools/convert/to_mlx.py made.

    dtype: "float32", "bfloat16", "float16" or "auto": float32 on a CPU, on a GPU what a converted folder stores and
        bfloat16 for any other. A quantised folder is "mlx-8bit" or "mlx-4bit" and nothing else; it computes in float32
        on a CPU, on a GPU in the type of its scales.
    device: "auto" (gpu where there is one), "cpu" or "gpu".
    weights: a folder that to_mlx.py made of this very checkpoint, to load instead of `model_dir`'s own weights.
    max_tokens_in_flight: positions of prompt and answer that all running requests together may hold; in float32 one
        costs 224 KiB at the released size, in the smaller types half, taken when first used.
    max_batch: requests that run at a time; more wait in order.
    prefill_chunk: prompt tokens read per step, while running requests go on.
    memory_limit: bytes beyond which MLX waits for memory to be freed before it takes more: a guideline, which it
        exceeds rather than fail. cache_limit: bytes of freed memory that MLX keeps for its next arrays. wired_limit:
        bytes that a Mac (macOS 15) keeps resident. All three are settings of the whole process; None leaves them alone.
    Raises BackendError for a value or device that cannot be had, CheckpointError for a damaged or foreign folder.
    """
    from gpa_engines.backends.mlx.engine import build_engine
    from gpa_engines.backends.mlx.memory import MemoryLimits

    return build_engine(
        model_dir,
        dtype,
        device,
        weights,
        max_tokens_in_flight,
        max_batch,
        prefill_chunk,
        MemoryLimits(memory_limit, cache_limit, wired_limit),
    )
