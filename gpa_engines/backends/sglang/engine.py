"""From a checkpoint folder and options to an SGLang engine, in a process of its own or over HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpa_codecs.errors import BackendError
from gpa_engines.lm_config import LMConfig
from gpa_engines.servers.lm_head import LMHead
from gpa_engines.servers.sglang_engine import SAMPLING_MODES, SamplingMode, SglangEngine, SglangFacts

if TYPE_CHECKING:
    from gpa_engines.engine import Engine

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cuda", "cpu")

SPARE = 7
"""Positions at the end of the context that SGLang keeps: 1 of it, 5 of a prompt and 1 of the answer."""

CPU_TOKENS = 8192
"""max_tokens_in_flight on a CPU where none is given, as of the torch backend; SGLang would take most of the memory."""

_WEIGHTS = "the model is the checkpoint's folder"
_IDS = "ids go in and out, no text"
_RULE = "every engine samples by one rule, which SGLang cannot keep with it"
_OURS = "the engine needs it as it is"

OPTIONS = {
    "tp_size": "tensor_parallel",
    "dp_size": "data_parallel",
    "mem_fraction_static": "mem_fraction",
    "max_total_tokens": "max_tokens_in_flight",
    "context_length": "max_context",
    "chunked_prefill_size": "prefill_chunk",
    "disable_radix_cache": "prefix_caching",
}
"""Fields of ServerArgs that an option of ours sets under another name."""

REFUSED = {
    "model_path": _WEIGHTS,
    "model": _WEIGHTS,
    "load_format": _WEIGHTS,
    "trust_remote_code": "no code of a checkpoint is ever run",
    "tokenizer_path": _IDS,
    "tokenizer_mode": _IDS,
    "skip_tokenizer_init": _IDS,
    "custom_sigquit_handler": _OURS,
    "stream_interval": _OURS,
    "stream_output": _OURS,
    "incremental_streaming_output": _OURS,
    "enable_return_hidden_states": _OURS,
    "return_hidden_states_mode": _OURS,
    "enable_custom_logit_processor": _OURS,
    "disable_overlap_schedule": "penalties, and the rule, need every token before the next is chosen",
    "json_model_override_args": _WEIGHTS,
    "preferred_sampling_params": _RULE,
    "sampling_defaults": _RULE,
    "allow_auto_truncate": "a prompt that is too long is refused, never cut",
    "enable_watermark": _RULE,
    "is_embedding": _WEIGHTS,
    "pp_size": "the rule runs where the last layer does, and SGLang's requests are elsewhere",
    "nnodes": "one machine has one engine; several are for backend 'remote'",
    "server_args": _OURS,
}
"""Fields of ServerArgs that are not the user's to set, and why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user sets, as `create_engine` explains it. Raises BackendError for a value that cannot be used."""

    device: str
    dtype: str
    sampling: str
    tensor_parallel: int
    data_parallel: int
    mem_fraction: float | None
    max_running_requests: int | None
    max_tokens_in_flight: int | None
    max_context: int | None
    prefill_chunk: int | None
    prefix_caching: bool
    attention_backend: str | None
    engine_args: Mapping[str, Any]

    def __post_init__(self) -> None:
        _expect("device", self.device, self.device in DEVICES, f"one of {', '.join(DEVICES)}")
        _expect("dtype", self.dtype, self.dtype in ("auto", *DTYPES), f"one of auto, {', '.join(DTYPES)}")
        modes = ("auto", *SAMPLING_MODES)
        _expect("sampling", self.sampling, self.sampling in modes, f"one of {', '.join(modes)}")
        for name in ("tensor_parallel", "data_parallel"):
            _expect(name, getattr(self, name), _is_count(getattr(self, name)), "a whole number of at least 1")
        for name in ("max_running_requests", "max_tokens_in_flight", "max_context", "prefill_chunk"):
            value = getattr(self, name)
            _expect(name, value, value is None or _is_count(value), "a whole number of at least 1")
        part = self.mem_fraction
        valid = part is None or (isinstance(part, int | float) and not isinstance(part, bool) and 0 < part < 1)
        _expect("mem_fraction", part, valid, "between 0 and 1")
        _expect("prefix_caching", self.prefix_caching, isinstance(self.prefix_caching, bool), "true or false")
        for name in self.engine_args:
            if name in OPTIONS:
                raise BackendError(
                    f"{name} is set by the option {OPTIONS[name]} of backend 'sglang': give that instead"
                )
            if name in REFUSED or name.startswith("speculative_"):
                raise BackendError(f"{name} cannot be set for backend 'sglang': {REFUSED.get(name, _RULE)}")

    def mode(self, usual: SamplingMode) -> SamplingMode:
        """Who chooses the tokens. usual: where the user leaves it open."""
        if self.sampling == "auto":
            return usual
        return "rule" if self.sampling == "rule" else "native"


def build_engine(folder: Path, settings: Settings) -> Engine:
    """Start SGLang and wait until the model is loaded."""
    from gpa_engines.backends.sglang.process import SglangProcess

    config = LMConfig.from_file(folder / "config.json")
    head = LMHead.find(folder, config)
    process = SglangProcess(server_args(folder, config, settings))
    facts = SglangFacts.from_server_info(process.server_info)
    return SglangEngine(
        process,
        facts,
        vocab_size=config.vocab_size,
        sampling=settings.mode("rule"),
        head=head,
        max_context=settings.max_context,
    )


def connect(folder: Path, settings: Settings, url: str, key_file: str | None, verify: bool | str) -> Engine:
    """The engine over a running server. Raises BackendError for options that only an engine of our own has."""
    from gpa_engines.servers.sglang_server import connect_server

    given = [each.name for each in fields(Settings) if getattr(settings, each.name) != getattr(UNSET, each.name)]
    if others := sorted(set(given) - {"sampling", "max_context", "dtype"}):
        raise BackendError(f"{', '.join(others)} cannot be set for a server that is running; start it with that")
    return connect_server(folder, settings.mode("native"), url, key_file, verify, settings.dtype, settings.max_context)


def server_args(folder: Path, config: LMConfig, settings: Settings) -> dict[str, Any]:
    """ServerArgs for the worker: the options, and what the adapter needs."""
    cpu = settings.device == "cpu"
    dtype = settings.dtype if settings.dtype != "auto" else "float32" if cpu else "bfloat16"
    rule = settings.mode("rule") == "rule"
    arguments: dict[str, Any] = {
        "model_path": str(folder),
        "device": settings.device,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        # Else penalties come a token late, and the rule is asked for a token before it knows the last.
        "disable_overlap_schedule": True,
        "enable_custom_logit_processor": rule,
        "enable_return_hidden_states": True,
        "stream_interval": 1,
        "trust_remote_code": False,
        "disable_radix_cache": not settings.prefix_caching,
        "grammar_backend": "none",
        "tp_size": settings.tensor_parallel,
        "dp_size": settings.data_parallel,
    }
    longest = config.max_position_embeddings
    if settings.max_context is not None:
        longest = min(settings.max_context + SPARE, longest)
    optional = {
        "context_length": longest,
        "mem_fraction_static": settings.mem_fraction,
        "max_running_requests": settings.max_running_requests,
        "max_total_tokens": settings.max_tokens_in_flight or (CPU_TOKENS if cpu else None),
        "chunked_prefill_size": settings.prefill_chunk,
        "attention_backend": settings.attention_backend or ("torch_native" if cpu else None),
    }
    arguments |= {name: value for name, value in optional.items() if value is not None}
    return arguments | dict(settings.engine_args)


def _expect(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise BackendError(f"{name} is {json.dumps(value, default=str)}; expected {expected}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


UNSET = Settings("auto", "auto", "auto", 1, 1, None, None, None, None, None, False, None, {})
"""Every option as it is where nobody sets it."""
