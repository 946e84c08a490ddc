"""The llama.cpp backend: GGUF files on CPUs and GPUs, through llama-cpp-python's low-level API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gpa_engines.step_engine import StepEngine


def create_engine(
    model: str | Path,
    *,
    dtype: str = "auto",
    mode: Literal["auto", "exact", "fast"] = "auto",
    threads: int | None = None,
    max_tokens_in_flight: int = 4096,
    max_batch: int = 8,
    prefill_chunk: int = 256,
    n_gpu_layers: int = 0,
    flash_attention: bool | None = None,
    prefix_reuse: bool = True,
) -> StepEngine:
    """Load GGUF files that tools/convert/to_gguf.py wrote.

    model: a .gguf file, or a folder with some in it or in its `gguf` subfolder. Of a folder, the full vocabulary and
        the speech and text files of one dtype are taken; each request goes to the smallest that has its ids, which is
        loaded then.
    dtype: which files of a folder: "auto" (of the dtypes that serve every task the first of q8_0, float16, bfloat16,
        float32, q6_k, q5_k_m, q4_k_m), or one of these names; f16, bf16 and f32 are understood, capitals too.
    mode: "exact" keeps keys and values in float32, computes every request by itself and reuses no prefixes; "fast"
        keeps them in float16 and multiplies tokens of several requests at once where no request's logits change by it:
        for quantised files on x86 (and on a GPU, where last bits do change). "auto" is exact for float32 files and fast
        for the others: each then is within the conformance limits of its dtype.
    threads: None takes the physical cores that this process may use. More threads than free cores are very slow.
    max_tokens_in_flight: positions of prompt and answer that the cache of a file has, divided evenly among as many
        requests as they suffice for; 112 KiB each at the released size in float16, 224 in float32. A file's cache is
        made when a request first needs it, for at most four requests, and anew, once nothing runs, for more or for
        requests that its division does not suit.
    max_batch: requests that run at a time; more wait in order.
    prefill_chunk: prompt tokens read per step, while running requests go on.
    n_gpu_layers: layers to compute on a GPU, -1 for all; needs a llama-cpp-python that was built for one.
    flash_attention: None is off on a CPU, where it is no faster and sums in float16, and llama.cpp's choice on a GPU.
    prefix_reuse: start a prompt from what an earlier one with the same beginning left in the cache; never when exact.
    Raises BackendError for a value that cannot be had, CheckpointError for files that are missing, damaged or foreign.
    """
    from gpa_engines.backends.llama_cpp.engine import Settings, build_engine

    return build_engine(
        Path(model),
        Settings(
            dtype=dtype,
            mode=mode,
            threads=threads,
            max_tokens_in_flight=max_tokens_in_flight,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
            n_gpu_layers=n_gpu_layers,
            flash_attention=flash_attention,
            prefix_reuse=prefix_reuse,
        ),
    )
