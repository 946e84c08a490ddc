"""Names of ServerArgs that tests use, in a class with fields as the real one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class ServerArgs:
    """`sglang.srt.server_args.ServerArgs`."""

    model_path: str
    device: str | None = None
    dtype: str = "auto"
    context_length: int | None = None
    max_total_tokens: int | None = None
    mem_fraction_static: float | None = None
    max_running_requests: int | None = None
    chunked_prefill_size: int | None = None
    attention_backend: str | None = None
    grammar_backend: str | None = None
    tp_size: int = 1
    dp_size: int = 1
    stream_interval: int = 1
    trust_remote_code: bool = False
    skip_tokenizer_init: bool = False
    disable_radix_cache: bool = False
    disable_overlap_schedule: bool = False
    enable_return_hidden_states: bool = False
    enable_custom_logit_processor: bool = False
    enable_deterministic_inference: bool = False
    log_level: str = "info"
    watchdog_timeout: float = 300
    _private: Any = None
