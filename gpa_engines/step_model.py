"""What an engine with its own forward pass brings to the scheduler: one step over ragged rows, with a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray


class StepModel(Protocol):
    """A forward pass over ragged rows with a cache. Everything runs on the engine's own thread.

    A row's result must not depend on the rows beside it. max_tokens: positions that all slots together can hold.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    @property
    def max_batch(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    def allocate(self, tokens: int) -> int | None:
        """A slot for up to `tokens` positions, or None while other slots take the room."""
        ...

    def release(self, slot: int) -> None: ...

    def step(self, rows: Sequence[StepRow]) -> list[NDArray[np.float32] | None]:
        """Feed every row. Per row: None, float32[R] ("last") or float32[len(ids), R] ("all"), unnormalised."""
        ...


@dataclass(frozen=True, slots=True)
class StepRow:
    """One request's part of a step: new ids at positions start, start + 1, ... of its slot.

    logits: "none" in the middle of a prompt, "last" for the last position, "all" for every one. candidates: which
    columns of the logits are wanted, None for the whole vocabulary.
    """

    slot: int
    ids: Sequence[int]
    start: int
    logits: Literal["none", "last", "all"] = "last"
    candidates: CandidateSet | None = None


class CandidateSet:
    """The ids that a request may emit; equal sets hash alike, so that a model can keep what it built for one.

    ids: int64[R], ascending.
    """

    __slots__ = ("_digest", "ids")

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self.ids = ids
        self._digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CandidateSet) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)
