"""The key-value cache: one pool of positions, of which every running request holds a contiguous part."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all slots.

    keys, values: [layers, kv_heads, tokens + 1, head_dim]; memory is touched (and so taken) only when written. The
    last position belongs to nobody: padded rows write there.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, kv_heads, tokens + 1, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.tokens = tokens
        self._parts: dict[int, range] = {}
        self._next_slot = 0

    @property
    def scratch(self) -> int:
        """The position that belongs to nobody."""
        return self.tokens

    def allocate(self, tokens: int) -> int | None:
        """A slot of `tokens` positions, or None when fewer are free. First fit; closes the gaps when none fits."""
        if tokens > self.tokens - sum(len(part) for part in self._parts.values()):
            return None
        start = self._find_gap(tokens)
        if start is None:
            self._compact()
            start = self._find_gap(tokens)
            assert start is not None
        slot = self._next_slot
        self._next_slot += 1
        self._parts[slot] = range(start, start + tokens)
        return slot

    def release(self, slot: int) -> None:
        del self._parts[slot]

    def offset(self, slot: int) -> int:
        """Where the slot's position 0 is now; valid until the next `allocate`."""
        return self._parts[slot].start

    def _find_gap(self, tokens: int) -> int | None:
        start = 0
        for part in sorted(self._parts.values(), key=lambda part: part.start):
            if part.start - start >= tokens:
                return start
            start = part.stop
        return start if self.tokens - start >= tokens else None

    def _compact(self) -> None:
        """Move every slot down to where the one before it ends."""
        start = 0
        for slot, part in sorted(self._parts.items(), key=lambda item: item[1].start):
            target = range(start, start + len(part))
            if target != part:
                for pool in (self.keys, self.values):
                    _move(pool, part, target)
                self._parts[slot] = target
            start = target.stop


def _move(pool: Tensor, source: range, target: range) -> None:
    """Layer by layer, because the ranges may overlap and a copy is needed in between."""
    for layer in pool:
        layer[:, target.start : target.stop] = layer[:, source.start : source.stop].clone()
