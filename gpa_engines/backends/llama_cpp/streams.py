"""Who has which part of a file's key-value cache, and what the free parts still hold.

llama.cpp can keep the cells of all sequences in one pool, or give every sequence a stream of cells of its own. In a
pool the order of a sum depends on where the neighbours' cells lie, and quantised activations turn that last bit into
other tokens; in streams a sequence lies the same way alone and in company. Streams are of one length, so they are
divided anew, when nothing runs, for requests that do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MIN_PREFIX = 16
"""Ids that a prompt must share with what a stream holds: below, reading them again costs less than the search."""

PAGE = 256
"""llama.cpp rounds a stream up to a multiple of this."""


@dataclass(frozen=True, slots=True)
class Division:
    """How a cache is divided: streams of `length` positions each."""

    streams: int
    length: int


def divide(max_tokens: int, max_batch: int, positions: int) -> Division:
    """The most streams, up to max_batch, of which each has room for `positions`, and what each then gets."""
    for streams in range(max_batch, 1, -1):
        length = max_tokens // streams // PAGE * PAGE
        if length >= positions:
            return Division(streams, length)
    return Division(1, -(-max(max_tokens, positions) // PAGE) * PAGE)


@dataclass(slots=True)
class Stream:
    """One stream. held: ids whose keys and values are in it, by position. released: when it was, counted."""

    number: int
    held: list[int] = field(default_factory=list)
    taken: bool = False
    released: int = 0


class Streams:
    """The streams of one division.

    chunk: prompts are read in pieces that end at its multiples. least: ids of a piece from which it does not matter, to
    the last bit, how many they are: a shorter one goes through other kernels.
    """

    def __init__(self, division: Division, *, chunk: int, least: int) -> None:
        self.division = division
        self._chunk = chunk
        self._least = least
        self.all = [Stream(number) for number in range(division.streams)]
        self._releases = 0

    @property
    def idle(self) -> bool:
        """Whether no request has a stream."""
        return not any(stream.taken for stream in self.all)

    def take(self, prompt: Sequence[int], *, reuse: bool) -> Stream | None:
        """A free stream, cut to what of `prompt` it may keep in `held`; None when all are taken.

        The longest shared beginning wins, then an empty stream, then the one that was released first. What is left to
        read goes through the kernels that the whole prompt would go through.
        """
        free = [stream for stream in self.all if not stream.taken]
        if not free:
            return None
        limit = len(prompt) - self._least if reuse else 0
        shared = {stream.number: self._kept(_shared(stream.held, prompt, limit)) for stream in free}
        best = min(free, key=lambda stream: (-shared[stream.number], bool(stream.held), stream.released))
        del best.held[shared[best.number] :]
        best.taken = True
        return best

    def _kept(self, shared: int) -> int:
        """`shared`, or less where the rest of its chunk would be a piece that is too short."""
        rest = -shared % self._chunk
        return shared if rest == 0 or rest >= self._least else shared - min(self._least - rest, self._chunk - rest)

    def release(self, number: int) -> None:
        """Free a stream; what it holds stays until another request needs the stream."""
        self._releases += 1
        self.all[number].taken, self.all[number].released = False, self._releases


def _shared(held: Sequence[int], prompt: Sequence[int], limit: int) -> int:
    """Length of the common beginning, at most `limit`; 0 when it is not worth it."""
    length = min(len(held), len(prompt), limit)
    if length < MIN_PREFIX:
        return 0
    different = np.flatnonzero(np.not_equal(held[:length], prompt[:length]))
    shared = int(different[0]) if len(different) else length
    return shared if shared >= MIN_PREFIX else 0
