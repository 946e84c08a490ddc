"""What goes over the pipe between the suite and the process that holds the engine: frames of JSON.

A frame is its length as four bytes, little-endian, then UTF-8 JSON. To the child: `{"open": ...}` once, then
`{"id": n, "call": "generate" | "logits" | "stop" | "close", ...}`. From the child: `{"id": n, ...}` with one of `info`,
`delta`, `file`, `done` and `error`.
"""

from __future__ import annotations

import builtins
import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gpa_codecs import errors
from gpa_engines.engine import EngineInfo, GenerationRequest, GenerationUsage, SamplingParams, TokenDelta

LENGTH = 4
"""Bytes of a frame's length."""


class EngineFault(Exception):
    """An engine in another process raised something that this process has no type for, or broke the contract."""


class WrongShape(EngineFault):
    """The engine's logits are not float32[T, V]; the message says what they are."""


def pack(message: Mapping[str, Any]) -> bytes:
    """A message as one frame."""
    body = json.dumps(message, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(LENGTH, "little") + body


def unpack(body: bytes) -> dict[str, Any]:
    """A frame's body as the message."""
    return json.loads(body.decode("utf-8", "surrogatepass"))


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise EngineFault(f"the engine gave {value!r} ({type(value).__name__}), which cannot be sent as JSON")


def request_to_wire(request: GenerationRequest) -> dict[str, Any]:
    return {
        "prompt_ids": request.prompt_ids,
        "sampling": asdict(request.sampling),
        "stop_ids": request.stop_ids,
        "allowed": _bounds(request.allowed),
    }


def request_from_wire(message: Mapping[str, Any]) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=tuple(message["prompt_ids"]),
        sampling=SamplingParams(**message["sampling"]),
        stop_ids=tuple(message["stop_ids"]),
        allowed=_ranges(message["allowed"]),
    )


def delta_to_wire(delta: TokenDelta) -> dict[str, Any]:
    """Raises EngineFault for something that is no TokenDelta."""
    if not isinstance(delta, TokenDelta):
        raise EngineFault(f"generate yielded {type(delta).__name__}; expected a gpa_engines.engine.TokenDelta")
    usage = None if delta.usage is None else asdict(delta.usage)
    return {"ids": [int(token) for token in delta.ids], "finish_reason": delta.finish_reason, "usage": usage}


def delta_from_wire(message: Mapping[str, Any]) -> TokenDelta:
    usage = message["usage"]
    return TokenDelta(
        tuple(message["ids"]), message["finish_reason"], None if usage is None else GenerationUsage(**usage)
    )


def info_to_wire(info: EngineInfo) -> dict[str, Any]:
    return asdict(info) | {"capabilities": sorted(info.capabilities), "logit_ids": _bounds(info.logit_ids)}


def info_from_wire(message: Mapping[str, Any]) -> EngineInfo:
    capabilities, logit_ids = frozenset(message["capabilities"]), _ranges(message["logit_ids"])
    return EngineInfo(**{**message, "capabilities": capabilities, "logit_ids": logit_ids})


def error_to_wire(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def error_from_wire(message: Mapping[str, Any]) -> Exception:
    """The same type with the same message where this process knows the type; a note holds the child's traceback."""
    name, text = message["type"], message["message"]
    own = {each.__name__: each for each in (EngineFault, WrongShape)}
    kind = own.get(name) or getattr(errors, name, None) or getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        error: Exception = EngineFault(f"{name}: {text}")
    else:
        try:
            error = kind(text)
        except Exception:  # a type that needs more than a message, e.g. UnicodeDecodeError
            error = EngineFault(f"{name}: {text}")
    error.add_note(f"in the engine's process:\n{message['traceback']}")
    return error


def _bounds(parts: Sequence[range] | None) -> list[list[int]] | None:
    return None if parts is None else [[ids.start, ids.stop] for ids in parts]


def _ranges(bounds: Sequence[Sequence[int]] | None) -> tuple[range, ...] | None:
    return None if bounds is None else tuple(range(start, stop) for start, stop in bounds)
