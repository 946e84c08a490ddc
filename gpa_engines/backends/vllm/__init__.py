"""The vLLM backend: CUDA servers and, with vLLM's CPU build, CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpa_engines.backends.vllm.engine import VllmEngine


def create_engine(
    checkpoint_dir: str | Path,
    *,
    dtype: str = "auto",
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    gpu_memory_utilization: float | None = None,
    max_num_seqs: int = 64,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    prefix_caching: bool = False,
    enforce_eager: bool | None = None,
    threads: int | None = None,
    kv_cache_gib: float | None = None,
    **engine_args: Any,
) -> VllmEngine:
    """Load the language model of a checkpoint folder into vLLM's AsyncLLM, whose processes end with the engine.

    dtype: "auto" (float32 on a CPU; elsewhere bfloat16, or float16 where the GPU has none), or one of these names.
    tensor_parallel, data_parallel: GPUs, or on a CPU processes, that share each request, and that share the requests.
    gpu_memory_utilization: part of a GPU's memory to take; None leaves it to vLLM, which takes most of it. On a CPU
        `kv_cache_gib` says how much is taken.
    max_num_seqs: requests that run at a time; more wait in order.
    max_context: positions of prompt and answer together, at most the checkpoint's. None takes the checkpoint's, on a
        CPU at most 8192.
    prefill_chunk: tokens of one step, so that a long prompt does not stall the others; None is 512 on a CPU and vLLM's
        choice elsewhere.
    prefix_caching: start a prompt from what an earlier one with the same beginning left in the cache; the last bits of
        an answer's logits then depend on what ran before.
    enforce_eager: run without compiling the model and without CUDA graphs; None is True on a CPU, where compiling takes
        longer than it saves, and False elsewhere.
    threads: CPU threads of each process; None takes OMP_NUM_THREADS, else the physical cores that this process may use.
    kv_cache_gib: GiB for keys and values; 112 KiB per position at the released size in bfloat16, 224 in float32. None
        is room for two longest requests on a CPU and what `gpu_memory_utilization` leaves elsewhere.
    engine_args: other fields of vLLM's AsyncEngineArgs, by vLLM's names; text is read as the field's type.
    Raises BackendError for a value, a device or a field that cannot be had and when vLLM does not start,
    CheckpointError for a damaged checkpoint.
    """
    from gpa_engines.backends.vllm.engine import build_engine
    from gpa_engines.backends.vllm.settings import Settings

    settings = Settings(
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        gpu_memory_utilization=gpu_memory_utilization,
        max_num_seqs=max_num_seqs,
        max_context=max_context,
        prefill_chunk=prefill_chunk,
        prefix_caching=prefix_caching,
        enforce_eager=enforce_eager,
        threads=threads,
        kv_cache_gib=kv_cache_gib,
        engine_args=engine_args,
    )
    return build_engine(Path(checkpoint_dir), settings)
