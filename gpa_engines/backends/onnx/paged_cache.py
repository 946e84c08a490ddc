"""The key-value cache: pages of positions, of which every running request holds as many as it has filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class _Holding:
    """A slot's part of the cache. reserved: positions that it may fill. pages: those that it has, in order."""

    reserved: int
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PageView:
    """The pages that one run sees, and whose they are.

    keys, values: per layer float32[P, kv_heads, 1, D, page] and [P, kv_heads, 1, page, D]. owner: int64[P], a row.
    ownership: float32[R, P]. mask: float32[P, 1, 1, 1, page]. See `tools/convert/onnx_conversion/lm_graph.py`.
    """

    keys: list[NDArray[np.float32]]
    values: list[NDArray[np.float32]]
    owner: NDArray[np.int64]
    ownership: NDArray[np.float32]
    mask: NDArray[np.float32]


class PagedCache:
    """Keys and values of all slots (pages: PagedAttention, Kwon et al. 2023).

    Pages are taken when positions are written, and move down when a slot leaves: the pages in use are always the first
    ones, so that a run sees them where they lie, and those of a slot always ascend, so that its sums do not depend, to
    the last bit, on what else is there. Memory is touched (and so taken) only when it is written. What was reserved is
    always there: every slot may waste a part of one page.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, tokens: int, slots: int, page: int) -> None:
        count = -(-tokens // page) + slots
        # Zeros, because whatever a masked position holds is multiplied by zero, and must be finite.
        self._keys = np.zeros((layers, count, kv_heads, 1, head_dim, page), np.float32)
        self._values = np.zeros((layers, count, kv_heads, 1, page, head_dim), np.float32)
        self._nothing = np.zeros((1, kv_heads, 1, head_dim, 1), np.float32)
        self.tokens, self.slots, self.page, self.layers = tokens, slots, page, layers
        self._holdings: dict[int, _Holding] = {}
        self._used = 0
        self._next_slot = 0

    def allocate(self, tokens: int) -> int | None:
        """A slot for `tokens` positions, or None while others hold them."""
        reserved = sum(holding.reserved for holding in self._holdings.values())
        if tokens > self.tokens - reserved or len(self._holdings) == self.slots:
            return None
        slot = self._next_slot
        self._next_slot += 1
        self._holdings[slot] = _Holding(tokens)
        return slot

    def release(self, slot: int) -> None:
        """Give the slot back, and close the gaps that it leaves."""
        if self._holdings.pop(slot).pages:
            self._close_gaps()

    def view(self, slots: Sequence[int], lengths: Sequence[int], *, exclusive: bool) -> PageView:
        """What the rows of a run see: the first `lengths` positions of these slots.

        exclusive: copy pages together rather than show others between them; pays where many queries read them.
        """
        pages = [
            self._holdings[slot].pages[: -(-length // self.page)] for slot, length in zip(slots, lengths, strict=True)
        ]
        every = [page for row in pages for page in row]
        if not every:
            return self._empty_view(len(slots))
        first, count = min(every), max(every) - min(every) + 1
        if exclusive and count > len(every):
            at = {page: place for place, page in enumerate(every)}
            keys, values = (list(pool[:, every]) for pool in (self._keys, self._values))
            count = len(every)
        else:
            at = {page: page - first for page in every}
            keys, values = (list(pool[:, first : first + count]) for pool in (self._keys, self._values))
        owner = np.zeros(count, np.int64)
        ownership = np.zeros((len(slots), count), np.float32)
        mask = np.full((count, self.page), -np.inf, np.float32)
        for row, (held, length) in enumerate(zip(pages, lengths, strict=True)):
            for place, page in enumerate(held):
                owner[at[page]] = row
                ownership[row, at[page]] = 1
                mask[at[page], : length - place * self.page] = 0
        return PageView(keys, values, owner, ownership, mask.reshape(count, 1, 1, 1, self.page))

    def write(
        self, slots: Sequence[int], starts: Sequence[int], keys: NDArray[np.float32], values: NDArray[np.float32]
    ) -> None:
        """Store what a run returned for `S` positions from `starts` on of these slots.

        keys: float32[R, kv_heads, layers, D, S]; values: float32[R, kv_heads, layers, S, D].
        """
        count = keys.shape[-1]
        for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
            held = self._hold(slot, start + count)
            done = 0
            while done < count:
                number, offset = divmod(start + done, self.page)
                size = min(self.page - offset, count - done)
                part, place = slice(done, done + size), slice(offset, offset + size)
                self._keys[:, held[number], :, 0, :, place] = keys[row, :, :, :, part].swapaxes(0, 1)
                self._values[:, held[number], :, 0, place] = values[row, :, :, part].swapaxes(0, 1)
                done += size

    def _hold(self, slot: int, length: int) -> list[int]:
        """The slot's pages, as many as `length` positions need."""
        holding = self._holdings[slot]
        while len(holding.pages) * self.page < length:
            holding.pages.append(self._used)
            self._used += 1
        return holding.pages

    def _empty_view(self, rows: int) -> PageView:
        """One masked position that is nobody's: reductions need something to reduce."""
        keys = [self._nothing] * self.layers
        values = [self._nothing.swapaxes(3, 4)] * self.layers
        mask = np.full((1, 1, 1, 1, 1), -np.inf, np.float32)
        return PageView(keys, values, np.zeros(1, np.int64), np.zeros((rows, 1), np.float32), mask)

    def _close_gaps(self) -> None:
        """Move every page in use down to where the one before it ends."""
        holdings = self._holdings.values()
        used = sorted((page, place, held.pages) for held in holdings for place, page in enumerate(held.pages))
        for target, (page, place, pages) in enumerate(used):
            if target != page:
                self._keys[:, target] = self._keys[:, page]
                self._values[:, target] = self._values[:, page]
                pages[place] = target
        self._used = len(used)
