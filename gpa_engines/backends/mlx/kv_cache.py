"""The key-value cache: every running request has arrays of its own, which grow with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx


@dataclass(slots=True)
class _Part:
    """One request's share. positions: that it may fill. keys, values: per layer, [1, kv_heads, capacity, head_dim]."""

    positions: int
    keys: list[mx.array] = field(default_factory=list)
    values: list[mx.array] = field(default_factory=list)


class KVCache:
    """Keys and values of all slots; together they never hold more than `tokens` positions.

    An array is written in place, since nothing else refers to it while a step is evaluated. One pool for all would be
    copied whole: each request's view of it keeps MLX from writing the next one's rows into it.
    """

    GROWTH = 256

    def __init__(self, layers: int, kv_heads: int, head_dim: int, tokens: int, dtype: mx.Dtype) -> None:
        self.layers = layers
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.tokens = tokens
        self.dtype = dtype
        self._parts: dict[int, _Part] = {}
        self._next_slot = 0

    def allocate(self, tokens: int) -> int | None:
        """A slot of `tokens` positions, or None when fewer are free."""
        if tokens > self.tokens - sum(part.positions for part in self._parts.values()):
            return None
        slot = self._next_slot
        self._next_slot += 1
        self._parts[slot] = _Part(tokens)
        return slot

    def release(self, slot: int) -> None:
        del self._parts[slot]

    def reserve(self, slot: int, length: int) -> None:
        """Make room for the first `length` positions of a slot; as many as it was given, or an IndexError."""
        part = self._parts[slot]
        if length > part.positions:
            raise IndexError(f"slot {slot} has {part.positions} positions; {length} are needed")
        capacity = part.keys[0].shape[2] if part.keys else 0
        if length <= capacity:
            return
        grown = min(-(-length // self.GROWTH) * self.GROWTH, part.positions)
        shape = (1, self.kv_heads, grown - capacity, self.head_dim)
        for arrays in (part.keys, part.values):
            # An array of zeros each: they are written in place.
            added = [mx.zeros(shape, self.dtype) for _ in range(self.layers)]
            if arrays:
                added = [mx.concatenate([old, new], axis=2) for old, new in zip(arrays, added, strict=True)]
            arrays[:] = added

    def write(self, slot: int, layer: int, start: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put new keys and values, [1, kv_heads, n, head_dim], at position `start`; all up to their end."""
        part = self._parts[slot]
        end = start + keys.shape[2]
        seen = []
        for arrays, new in ((part.keys, keys), (part.values, values)):
            arrays[layer][:, :, start:end] = new
            seen.append(arrays[layer][:, :, :end])
        return seen[0], seen[1]

    def arrays(self, slot: int) -> list[mx.array]:
        """All of a slot, to be evaluated with the step that wrote it."""
        part = self._parts[slot]
        return [*part.keys, *part.values]
