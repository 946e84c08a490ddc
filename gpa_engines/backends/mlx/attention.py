"""Attention over the cache, one call per row: nothing is padded, and no row knows of another.

A row's new keys and values are written first; then every query sees the positions up to its own. Heads are grouped
(GQA, Ainslie et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from gpa_engines.backends.mlx.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Span:
    """`count` new positions from `start` on of a slot."""

    slot: int
    start: int
    count: int


class RowPlan:
    """What one step's attention needs to know, the same for every layer."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self.cache = cache
        self.spans = spans
        for span in spans:
            cache.reserve(span.slot, span.start + span.count)

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """queries: [M, heads, D]; keys, values: [M, kv_heads, D] -> [M, heads · D]."""
        rows, heads, width = queries.shape
        results = []
        at = 0
        for span in self.spans:
            # [count, heads, D] -> [1, heads, count, D]
            chunk, new_keys, new_values = (
                x[at : at + span.count].transpose(1, 0, 2)[None] for x in (queries, keys, values)
            )
            seen_keys, seen_values = self.cache.write(span.slot, layer, span.start, new_keys, new_values)
            mask = None if span.count == 1 else "causal"
            result = mx.fast.scaled_dot_product_attention(chunk, seen_keys, seen_values, scale=width**-0.5, mask=mask)
            results.append(result[0].transpose(1, 0, 2).reshape(span.count, heads * width))
            at += span.count
        assert at == rows
        return results[0] if len(results) == 1 else mx.concatenate(results)
