"""What an engine with its own forward pass brings to the scheduler: one step over ragged rows, with a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import GpaError


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

    def allocate(self, request: SlotRequest) -> Slot | None:
        """Room for a request, or None while other slots take it. Raises a GpaError for one that it cannot serve."""
        ...

    def release(self, slot: int) -> None:
        """Give back the slot of that number."""
        ...

    def step(self, rows: Sequence[StepRow]) -> list[NDArray[np.float32] | None]:
        """Feed every row. Per row: None, float32[R] ("last") or float32[n, R] ("at", n offsets), unnormalised.

        May raise StepInterrupted, after which every slot holds what it held before the step.
        """
        ...


@runtime_checkable
class Interruptible(Protocol):
    """A step model whose step can be broken off."""

    def interrupt(self) -> None:
        """Let the step that is running, if there is one, raise StepInterrupted soon. Called from any thread."""
        ...


class StepInterrupted(GpaError):
    """The step was broken off on request; nothing has changed, and it may be repeated."""


@dataclass(frozen=True, slots=True)
class SlotRequest:
    """What a request wants of the cache.

    positions: of prompt and answer together. prompt: its ids. candidates: the columns that it will ask for, None for
    the whole vocabulary. reuse: whether positions that an earlier prompt filled with the same ids may be taken over.
    """

    positions: int
    prompt: Sequence[int]
    candidates: CandidateSet | None = None
    reuse: bool = False


@dataclass(frozen=True, slots=True)
class Slot:
    """A request's part of the cache. filled: leading positions of the prompt that it holds already, not all of them."""

    number: int
    filled: int = 0


@dataclass(frozen=True, slots=True)
class StepRow:
    """One request's part of a step: new ids at positions start, start + 1, ... of its slot.

    logits: "none" in the middle of a prompt, "last" for the last position, "at" for those whose offsets in `ids` are
    given. candidates: which columns of the logits are wanted, None for the whole vocabulary.
    """

    slot: int
    ids: Sequence[int]
    start: int
    logits: Literal["none", "last", "at"] = "last"
    candidates: CandidateSet | None = None
    offsets: Sequence[int] = ()


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
