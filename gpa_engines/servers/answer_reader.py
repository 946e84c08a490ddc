"""What a server may stream as an answer, whatever its kind: ids of the vocabulary, asked for, and not too many."""

from __future__ import annotations

from typing import Any

from gpa_engines.engine import FinishReason, GenerationRequest
from gpa_engines.sampling import candidate_ids
from gpa_engines.servers.http_server import MalformedStream


class AnswerReader:
    """Checks one answer as it comes; a server that breaks the rules must not pass as one that keeps them.

    url: of the server, for messages.
    """

    def __init__(self, url: str, request: GenerationRequest, vocab_size: int) -> None:
        self._url = url
        self._request = request
        self._vocab_size = vocab_size
        self._stops = frozenset(request.stop_ids)
        candidates = candidate_ids(request.allowed, request.stop_ids)
        self._candidates = None if candidates is None else frozenset(candidates.tolist())
        self._count = 0

    def take(self, ids: Any, reason: FinishReason | None) -> tuple[int, ...]:
        """The new ids of one event, without the stop id that ends the answer. Raises MalformedStream."""
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise self._malformed(f"its token ids are {str(ids)[:80]}; expected a list of integers")
        if reason == "stop":
            if not ids or ids[-1] not in self._stops:
                raise self._malformed(
                    f"it ended at {f'id {ids[-1]}' if ids else 'no id'}, which is not one of the stop ids "
                    f"{list(self._request.stop_ids)}"
                )
            ids = ids[:-1]
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise self._malformed(f"id {token} is outside the vocabulary of {self._vocab_size}")
            if token in self._stops:
                raise self._malformed(f"stop id {token} came and the answer went on")
            if self._candidates is not None and token not in self._candidates:
                raise self._malformed(f"id {token} is not among the allowed ones")
        self._count += len(ids)
        most = self._request.sampling.max_new_tokens
        if self._count > most:
            raise self._malformed(f"{self._count} ids came, though max_new_tokens is {most}")
        if reason == "length" and self._count < most:
            raise self._malformed(
                f"the server cut it off after {self._count} of {most} ids; its own limit is lower than what was asked: "
                "start it without a generation_config that sets one (vLLM: --generation-config vllm)"
            )
        return tuple(ids)

    def _malformed(self, what: str) -> MalformedStream:
        return MalformedStream(f"{self._url} gave a wrong answer: {what}")
