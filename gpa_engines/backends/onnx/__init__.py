"""The ONNX Runtime backend: the widest fallback, on files that `tools/convert/to_onnx.py --what lm` writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpa_engines.step_engine import StepEngine


def create_engine(
    model_dir: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    max_tokens_in_flight: int = 8192,
    max_batch: int = 16,
    prefill_chunk: int = 256,
) -> StepEngine:
    """Load an exported language model: the output of the converter, or a checkpoint that has it in `onnx/`.

    device: "cpu", or the name of another execution provider that the installed ONNX Runtime has, "cuda" for
        CUDAExecutionProvider and so on. "auto" is the CPU. Nothing but the CPU has been verified, and keys and values
        stay in the host's memory, so that another device reads them over its bus in every step.
    dtype: "float32", "float16", "int8" as exported, or "auto", the most exact one that was. float16 weights take half
        the disk and are expanded to float32 when they are loaded; int8 is the fast and the small one, from ONNX Runtime
        1.25 on (older ones have no kernel for it: right, but eight times slower).
    threads: compute threads of this engine; None lets ONNX Runtime choose, one per physical core.
    max_tokens_in_flight: positions of prompt and answer that all running requests together may hold; one costs 224 KiB
        at the released size, taken when first used.
    max_batch: requests that run at a time; more wait in order.
    prefill_chunk: prompt tokens read per step, while running requests go on.
    Raises BackendError for a value, device or precision that cannot be had, CheckpointError for missing or damaged
    files.
    """
    from gpa_engines.backends.onnx.engine import build_engine

    return build_engine(model_dir, device, dtype, threads, max_tokens_in_flight, max_batch, prefill_chunk)
