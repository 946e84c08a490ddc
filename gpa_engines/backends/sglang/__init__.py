"""The SGLang backend: in a process of its own, or a server that is reached over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpa_engines.engine import Engine


def create_engine(
    model_dir: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    sampling: str = "auto",
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    mem_fraction: float | None = None,
    max_running_requests: int | None = None,
    max_tokens_in_flight: int | None = None,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    prefix_caching: bool = False,
    attention_backend: str | None = None,
    url: str | None = None,
    key_file: str | None = None,
    verify: bool | str = True,
    **engine_args: Any,
) -> Engine:
    """Load the language model of a checkpoint folder into `sglang.Engine`, or reach a server that has it.

    device: "auto" and "cuda" are the GPUs, "cpu" is SGLang's CPU engine (see docs/backends.md).
    dtype: "auto" (float32 on a CPU, bfloat16 elsewhere), "float32", "bfloat16" or "float16".
    sampling: "rule" lets the project's own sampling rule choose the tokens inside SGLang, exactly and with seeds;
        "native" leaves it to SGLang's sampler, which has no seeds and is asked for nothing that it does otherwise.
        "auto" is "rule" in process and "native" over HTTP, where "rule" asks for a server that has gpa-engines
        installed and was started with --enable-custom-logit-processor.
    tensor_parallel, data_parallel: GPUs that share each request, and that share the requests.
    mem_fraction: part of the memory that weights and cache may take; None leaves it to SGLang.
    max_running_requests: that run at a time; more wait. None leaves it to SGLang.
    max_tokens_in_flight: positions that all running requests together may hold; None is what memory allows, on a CPU
        8192.
    max_context: positions of prompt and answer together, at most the checkpoint's less 7, which SGLang keeps.
    prefill_chunk: prompt tokens per step, so that a long prompt does not stall the others; None leaves it to SGLang.
    prefix_caching: start a prompt from what an earlier one with the same beginning left in the cache; the last bits of
        an answer's logits then depend on what ran before.
    attention_backend: SGLang's; None leaves it to SGLang, on a CPU it is "torch_native".
    url: of a running SGLang server, which is then used in place of an engine here. key_file: holds its bearer key;
        None takes the environment variable GPA_REMOTE_KEY. verify: whether its certificate is checked, or a file of
        authorities.
    engine_args: other fields of SGLang's ServerArgs, by SGLang's names.
    Raises BackendError for a value, a device or a field that cannot be had, for an SGLang that does not start and a
    server that cannot be used; CheckpointError for a damaged checkpoint.
    """
    from gpa_engines.backends.sglang.engine import Settings, build_engine, connect

    folder = Path(model_dir)
    settings = Settings(
        device=device,
        dtype=dtype,
        sampling=sampling,
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        mem_fraction=mem_fraction,
        max_running_requests=max_running_requests,
        max_tokens_in_flight=max_tokens_in_flight,
        max_context=max_context,
        prefill_chunk=prefill_chunk,
        prefix_caching=prefix_caching,
        attention_backend=attention_backend,
        engine_args=engine_args,
    )
    if url is None:
        return build_engine(folder, settings)
    return connect(folder, settings, url, key_file, verify)
