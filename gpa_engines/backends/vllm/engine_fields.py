"""A user's own engine arguments for vLLM: which are refused, and how text becomes a field's type.

Types are looked at as objects, so nothing here imports vLLM.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gpa_codecs.errors import BackendError

OPTIONS = {
    "tensor_parallel_size": "tensor_parallel",
    "data_parallel_size": "data_parallel",
    "max_model_len": "max_context",
    "max_num_batched_tokens": "prefill_chunk",
    "enable_prefix_caching": "prefix_caching",
    "kv_cache_memory_bytes": "kv_cache_gib",
}
"""Fields that an option of ours sets under another name."""

_IDS = "ids go in and out, no text"
_WEIGHTS = "the model is the checkpoint's folder"
_RULE = "every engine samples by one rule, which vLLM cannot keep with it"
_TIMES = "a request's times come from it"

OURS = {
    "model": _WEIGHTS,
    "model_weights": _WEIGHTS,
    "served_model_name": _WEIGHTS,
    "hf_config_path": _WEIGHTS,
    "runner": _WEIGHTS,
    "convert": _WEIGHTS,
    "trust_remote_code": "no code of a checkpoint is ever run",
    "tokenizer": _IDS,
    "tokenizer_mode": _IDS,
    "tokenizer_revision": _IDS,
    "skip_tokenizer_init": _IDS,
    "enable_prompt_embeds": _IDS,
    "seed": "every request has its own",
    "generation_config": _RULE,
    "override_generation_config": _RULE,
    "logits_processors": _RULE,
    "speculative_config": _RULE,
    "spec_method": _RULE,
    "spec_model": _RULE,
    "spec_tokens": _RULE,
    "watermark_config": _RULE,
    "diffusion_config": _RULE,
    "return_sampling_mask": _RULE,
    "enable_trace_replay": _RULE,
    "max_logprobs": "the engine's logits need all of them",
    "logprobs_mode": "the engine's logits are raw",
    "enable_chunked_prefill": "a long prompt must not stall the others",
    "disable_log_stats": _TIMES,
}
"""Fields that are not the user's to set, and why."""


def read_fields(given: Mapping[str, Any], known: Mapping[str, Any], options: tuple[str, ...]) -> dict[str, Any]:
    """The given engine arguments as their fields' types.

    known: the type of every field of AsyncEngineArgs, by name. options: names of our own. Raises BackendError for a
    name that vLLM does not know, one that the engine sets itself, and a value that is not of the field's type.
    """
    return {name: _read_field(name, value, known, options) for name, value in given.items()}


def _read_field(name: str, value: Any, known: Mapping[str, Any], options: tuple[str, ...]) -> Any:
    if name in OPTIONS:
        raise BackendError(f"{name} is set by the option {OPTIONS[name]} of backend 'vllm': give that instead")
    if name in OURS:
        raise BackendError(f"{name} cannot be set for backend 'vllm': {OURS[name]}")
    if name not in known or name.startswith("_"):
        near = difflib.get_close_matches(name, [*options, *known], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BackendError(
            f"backend 'vllm' has no option {name!r}, and vLLM's AsyncEngineArgs no such field{hint} Its options: "
            f"{', '.join(options)}"
        )
    try:
        return read_value(value, known[name])
    except ValueError:
        raise BackendError(f"{name} is {value!r}; vLLM expects {describe(known[name])}") from None


def read_value(value: Any, kind: Any) -> Any:
    """The value as a type: of a command line it is text, or what JSON made of the text. Raises ValueError."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return read_value(value, members[0])
    if origin in (Union, types.UnionType):
        return _read_union(value, members)
    if origin is Literal:
        for member in members:
            if value == member or str(value) == member:
                return member
        raise ValueError
    if kind is None or kind is types.NoneType:
        if value is None or value == "None":
            return None
        raise ValueError
    if kind in READERS:
        return READERS[kind](value)
    if kind in (list, set, tuple) or origin in (list, set, tuple):
        return _read_sequence(value, origin or kind, members)
    if kind is dict or origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
        raise ValueError
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _read_enum(value, kind)
    return value  # vLLM's own configurations, which it makes of a JSON object and judges itself


def describe(kind: Any) -> str:
    """A type in words for an error message."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(members[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(member) for member in members))
    if origin is Literal:
        return ", ".join(map(str, members))
    if kind is None or kind is types.NoneType:
        return "null"
    return WORDS.get(kind) or WORDS.get(origin) or str(getattr(kind, "__name__", kind))


def _read_union(value: Any, members: tuple[Any, ...]) -> Any:
    """As the member that it is already, else as the first that can be read; text is the last resort."""
    for member in members:
        if isinstance(member, type) and type(value) is member and member is not str:
            return value
    for member in sorted(members, key=lambda member: member is str):
        try:
            return read_value(value, member)
        except ValueError:
            continue
    raise ValueError


def _read_sequence(value: Any, kind: Any, members: tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    elif not isinstance(value, list | tuple | set):
        value = [value]
    member = members[0] if members else Any
    return kind(read_value(each, member) for each in value)


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "false": False}
    if str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    if not isinstance(value, int | float | str):
        raise ValueError
    return int(value)


def _read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def _read_str(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError


def _read_enum(value: Any, kind: type[Enum]) -> Enum:
    for member in kind:
        if value == member or str(value).upper() == member.name.upper() or value == member.value:
            return member
    raise ValueError


READERS: Mapping[Any, Any] = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}

WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    set: "a list",
    tuple: "a list",
    dict: "a JSON object",
}
