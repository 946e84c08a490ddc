"""What a user sets of the engine, and the engine arguments of vLLM that this comes to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpa_codecs.errors import BackendError
from gpa_engines.lm_config import LMConfig

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Names and bytes per value."""

CPU_CONTEXT = 8192
CPU_CHUNK = 512

CPU_BLOCK = 128
"""Positions of a block of vLLM's cache on a CPU. One block is never given out, and every request may fill its last one
by a part only."""

RULE_CLASS = "gpa_engines.backends.vllm.sampling_rule:SamplingRule"


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of :func:`gpa_engines.backends.vllm.create_engine`."""

    dtype: str
    tensor_parallel: int
    data_parallel: int
    gpu_memory_utilization: float | None
    max_num_seqs: int
    max_context: int | None
    prefill_chunk: int | None
    prefix_caching: bool
    enforce_eager: bool | None
    threads: int | None
    kv_cache_gib: float | None
    engine_args: Mapping[str, Any]

    def check(self) -> None:
        """Raise BackendError for a value that can never be had."""
        if self.dtype not in ("auto", *DTYPES):
            raise BackendError(
                f"dtype {self.dtype!r} is unknown to backend 'vllm'; expected auto, {', '.join(DTYPES)}; for quantised "
                "weights, see vLLM's own argument: quantization=fp8"
            )
        sizes = ("tensor_parallel", "data_parallel", "max_num_seqs", "max_context", "prefill_chunk", "threads")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise BackendError(f"{name} is {value!r}; expected a whole number of at least 1")
        for name, kinds in (("prefix_caching", bool), ("enforce_eager", bool | None)):
            if not isinstance(getattr(self, name), kinds):
                raise BackendError(f"{name} is {getattr(self, name)!r}; expected true or false")
        share = self.gpu_memory_utilization
        if share is not None and not (_is_number(share) and 0 < share <= 1):
            raise BackendError(f"gpu_memory_utilization is {share!r}; expected above 0 and at most 1, such as 0.5")
        space = self.kv_cache_gib
        if space is not None and not (_is_number(space) and space > 0):
            raise BackendError(f"kv_cache_gib is {space!r}; expected GiB above 0, such as 2")

    def context(self, config: LMConfig, device: str) -> int:
        """Positions of prompt and answer. Raises BackendError for more than the checkpoint has."""
        most = config.max_position_embeddings
        if self.max_context is None:
            return min(most, CPU_CONTEXT) if device == "cpu" else most
        if self.max_context > most:
            raise BackendError(f"max_context is {self.max_context}; the checkpoint has {most} positions")
        return self.max_context

    def eager(self, device: str) -> bool:
        """Whether the model runs uncompiled."""
        return device == "cpu" if self.enforce_eager is None else self.enforce_eager

    def resolved_dtype(self, device: str, *, has_bfloat16: bool) -> str:
        """A name of `DTYPES`. Raises BackendError for bfloat16 where the device has none."""
        if self.dtype == "auto":
            return "float32" if device == "cpu" else "bfloat16" if has_bfloat16 else "float16"
        if self.dtype == "bfloat16" and not has_bfloat16:
            raise BackendError("dtype 'bfloat16' is not available on this device: use float16, or auto")
        return self.dtype

    def engine_fields(
        self, folder: Path, config: LMConfig, *, device: str, dtype: str, generation_config: Path
    ) -> dict[str, Any]:
        """Values of AsyncEngineArgs, without the user's own `engine_args`.

        generation_config: a folder whose generation_config.json is empty, since vLLM adds the end tokens of the
        checkpoint's own to every request's, whatever it is told.
        """
        context = self.context(config, device)
        fields: dict[str, Any] = {
            "model": str(folder),
            "skip_tokenizer_init": True,
            "generation_config": str(generation_config),
            "trust_remote_code": False,
            "dtype": dtype,
            "seed": 0,
            "max_model_len": min(context + 1, config.max_position_embeddings),
            "max_num_seqs": self.max_num_seqs,
            "max_logprobs": -1,
            "logprobs_mode": "raw_logits",
            "logits_processors": [RULE_CLASS],
            "enable_prefix_caching": self.prefix_caching,
            "enable_chunked_prefill": True,
            "enforce_eager": self.eager(device),
            "tensor_parallel_size": self.tensor_parallel,
            "data_parallel_size": self.data_parallel,
            # Without statistics vLLM tells no times of a request.
            "disable_log_stats": False,
        }
        if self.gpu_memory_utilization is not None:
            fields["gpu_memory_utilization"] = self.gpu_memory_utilization
        chunk = self.prefill_chunk or (CPU_CHUNK if device == "cpu" else None)
        if chunk is not None:
            fields["max_num_batched_tokens"] = max(chunk, self.max_num_seqs)
        if (space := self._cache_bytes(config, device, dtype, context)) is not None:
            fields["kv_cache_memory_bytes"] = space
        return fields

    def _cache_bytes(self, config: LMConfig, device: str, dtype: str, context: int) -> int | None:
        if self.kv_cache_gib is not None:
            return int(self.kv_cache_gib * 2**30)
        if device != "cpu" or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            return None
        heads = -(-config.num_key_value_heads // self.tensor_parallel)
        position = 2 * config.num_hidden_layers * heads * config.head_dim * DTYPES[dtype]
        blocks = 2 * -(-context // CPU_BLOCK) + 1
        return position * CPU_BLOCK * blocks


def default_threads() -> int:
    """OMP_NUM_THREADS, else the physical cores that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if given.isdecimal() and int(given) > 0:
        return int(given)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return len({_core(cpu) for cpu in usable})


def _core(cpu: int) -> str:
    """What the hardware threads of one core have in common; the thread's own number where the system does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
