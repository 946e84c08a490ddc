"""What SGLang streams, in either of its styles, as new ids and how the answer ended.

In process every chunk holds all ids so far, in one list that goes on growing; over HTTP with
`--incremental-streaming-output` an event holds the new ones alone, and without it all. `completion_tokens` tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import CapacityError, DeclinedRequest, RequestError

SHOWN = 200
"""Characters of an unexpected value that a message repeats."""


class UnexpectedOutput(RequestError):
    """SGLang sent something that none of its known versions sends."""


class RequestAborted(RequestError):
    """SGLang gave a request up, or failed. status: HTTP's, None where it says none."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Finish:
    """How SGLang ended an answer. matched: the end id, which is the last of the ids; None at the length limit."""

    kind: Literal["stop", "length"]
    matched: int | None = None


class OutputReader:
    """Chunks of one request, one after the other."""

    def __init__(self) -> None:
        self._known = 0

    def read(self, chunk: Mapping[str, Any]) -> tuple[tuple[int, ...], Finish | None]:
        """The chunk's new ids, and how the answer ended if it did.

        Raises RequestAborted for a request that SGLang gave up, DeclinedRequest for one that it refuses, and
        UnexpectedOutput for a chunk that makes no sense behind those before.
        """
        if "error" in chunk:
            raise aborted(chunk["error"])
        meta, ids = chunk.get("meta_info"), chunk.get("output_ids")
        if not isinstance(meta, Mapping) or not isinstance(ids, Sequence) or isinstance(ids, str):
            raise UnexpectedOutput(f"SGLang sent {_shown(chunk)}; expected output_ids and meta_info")
        reason = meta.get("finish_reason")
        if isinstance(reason, Mapping) and reason.get("type") == "abort":
            raise aborted({"message": reason.get("message") or "aborted", "code": reason.get("status_code")})
        new = self._new(ids, meta.get("completion_tokens"))
        return new, None if reason is None else _finish(reason, new)

    def _new(self, ids: Sequence[int], total: object) -> tuple[int, ...]:
        if not isinstance(total, int) or total < self._known:
            raise UnexpectedOutput(f"SGLang counts {total!r} tokens of an answer that had {self._known}")
        count = total - self._known
        if len(ids) >= total:
            # All so far; in process the list may have grown since the chunk was made.
            new = tuple(ids[self._known : total])
        elif len(ids) == count:
            new = tuple(ids)
        else:
            raise UnexpectedOutput(f"SGLang sent {len(ids)} ids; expected {count} new ones or all {total}")
        if not all(type(token) is int for token in new):
            raise UnexpectedOutput(f"SGLang sent {_shown(new)} where ids were expected")
        self._known = total
        return new


def hidden_rows(chunk: Mapping[str, Any], count: int) -> NDArray[np.float32]:
    """float32[N, H]: the last layer's output, normalised, at the last N of the `count` positions of a prompt.

    Positions that SGLang found in its cache are missing, and of a long prompt all but those of its last part. Raises
    UnexpectedOutput where there is none at all.
    """
    if "error" in chunk:
        raise aborted(chunk["error"])
    meta = chunk.get("meta_info")
    reason = meta.get("finish_reason") if isinstance(meta, Mapping) else None
    if isinstance(reason, Mapping) and reason.get("type") == "abort":
        raise aborted({"message": reason.get("message") or "aborted", "code": reason.get("status_code")})
    parts = meta.get("hidden_states") if isinstance(meta, Mapping) else None
    if not isinstance(parts, Sequence):
        raise UnexpectedOutput("SGLang sent no hidden_states; was it started with --enable-return-hidden-states?")
    try:
        rows = [np.asarray(part, np.float32) for part in parts]
        stacked = np.concatenate([part if part.ndim == 2 else part[None] for part in rows])
    except ValueError as error:
        raise UnexpectedOutput(f"SGLang's hidden_states are no rows of one width: {error}") from None
    if not 0 < len(stacked) <= count:
        raise UnexpectedOutput(f"SGLang sent hidden_states of {len(stacked)} positions; the prompt has {count}")
    return stacked


def aborted(error: object) -> RequestError:
    """The exception for what SGLang says of a request: DeclinedRequest for one that it refuses, else RequestAborted."""
    code = None
    if isinstance(error, Mapping):
        code = error.get("code")
        error = error.get("message", error)
    message, status = str(error), code if isinstance(code, int) else None
    if "context length" in message or "maximum allowed length" in message:
        return CapacityError(f"SGLang refused the request: {message}")
    if status is not None and 400 <= status < 500:
        return DeclinedRequest(f"SGLang refused the request: {message}")
    return RequestAborted(f"SGLang gave the request up: {message}", status)


def _finish(reason: object, new: tuple[int, ...]) -> Finish:
    if isinstance(reason, Mapping):
        kind, matched = reason.get("type"), reason.get("matched")
        if kind == "length":
            return Finish("length")
        if kind == "stop" and isinstance(matched, int) and new and new[-1] == matched:
            return Finish("stop", matched)
    raise UnexpectedOutput(f"SGLang ended an answer with {_shown(reason)} and the ids {_shown(new[-3:])}")


def _shown(value: object) -> str:
    words = repr(value)
    return words if len(words) <= SHOWN else words[: SHOWN - 3] + "..."
