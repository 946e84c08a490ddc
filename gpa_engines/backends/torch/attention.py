"""Attention over the cache: the seam between a CPU (one call per row) and accelerators (one padded call).

Both write the new keys and values first and then let every query see the positions up to its own. Heads are grouped
(GQA, Ainslie et al. 2023): the query heads that share a key-value head are treated as more query rows of that head, so
keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gpa_engines.backends.torch.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Span:
    """`count` new positions from `start` on of a slot whose position 0 is at `offset` of the pool."""

    offset: int
    start: int
    count: int

    @property
    def length(self) -> int:
        return self.start + self.count


class AttentionPlan(Protocol):
    """What one step's attention needs to know, the same for every layer."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries: [M, heads, D]; keys, values: [M, kv_heads, D] -> [M, heads · D], contiguous."""
        ...


PlanFactory = Callable[[KVCache, Sequence[Span], int], AttentionPlan]
"""(cache, spans, rows of the step) -> the step's plan."""

AttentionKernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""queries: [B, H, Q, D]; keys, values: [B, H, K, D]; mask: bool[B, 1, Q, K], True where a query looks; -> [B, H, Q, D].
Where a device's own fused attention would come in."""


def eager_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention as two products and a float32 softmax, which every device has and computes in one known order."""
    # Scaled before the product, which could be beyond float16 otherwise.
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights.to(values.dtype) @ values


def padded_plans(kernel: AttentionKernel) -> PlanFactory:
    """Plans that make one call of `kernel` for all rows."""
    return lambda cache, spans, rows: PaddedPlan(cache, spans, kernel=kernel)


def usual_plans(device: torch.device) -> PlanFactory:
    """A call per row on a CPU, one call for all elsewhere."""
    return RowPlan if device.type == "cpu" else padded_plans(F.scaled_dot_product_attention)


class RowPlan:
    """One call per row over a view of its part of the pool: nothing is copied, and no row knows of another."""

    def __init__(self, cache: KVCache, spans: Sequence[Span], rows: int) -> None:
        """rows: M; rows beyond the spans' own are padding, whose result is whatever the last span's row has."""
        self.cache = cache
        written = [span.offset + at for span in spans for at in range(span.start, span.length)]
        self.written = torch.tensor(written)
        self.padding = rows - len(written)
        self.spans = spans
        self.single = all(span.count == 1 for span in spans)
        self.masks = [_causal_mask(span) for span in spans]

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        pools = (self.cache.keys[layer], self.cache.values[layer])
        rows, heads, width = queries.shape
        new = len(self.written)
        for pool, rows_in in zip(pools, (keys, values), strict=True):
            pool.index_copy_(1, self.written, rows_in[:new].transpose(0, 1))
        kv_heads = keys.shape[1]
        strides = pools[0].stride()
        base = pools[0].storage_offset()
        grouped = queries.view(rows, 1, kv_heads, heads // kv_heads, width)
        results = []
        at = 0
        for span, mask in zip(self.spans, self.masks, strict=True):
            view = (1, kv_heads, span.length, width), (0, *strides), base + span.offset * strides[1]
            seen_keys, seen_values = pools[0].as_strided(*view), pools[1].as_strided(*view)
            if span.count == 1:
                result = F.scaled_dot_product_attention(grouped[at], seen_keys, seen_values)
                results.append(result.view(1, heads * width))
            else:
                chunk = queries[at : at + span.count].transpose(0, 1)[None]
                result = F.scaled_dot_product_attention(chunk, seen_keys, seen_values, attn_mask=mask, enable_gqa=True)
                results.append(result[0].transpose(0, 1).reshape(span.count, heads * width))
            at += span.count
        results.extend(results[-1][-1:] for _ in range(self.padding))
        return results[0] if len(results) == 1 else torch.cat(results)


class PaddedPlan:
    """One call for all rows over gathered, padded keys and values: static shapes for accelerators.

    bucket: the padded key count is a multiple of it, so that few shapes occur.
    """

    def __init__(
        self,
        cache: KVCache,
        spans: Sequence[Span],
        bucket: int = 256,
        kernel: AttentionKernel = F.scaled_dot_product_attention,
    ) -> None:
        self.cache = cache
        self.kernel = kernel
        self.batch = len(spans)
        self.queries = max(span.count for span in spans)
        length = -(-max(span.length for span in spans) // bucket) * bucket
        device = cache.keys.device
        offset, start, count = (
            torch.tensor(column) for column in zip(*((s.offset, s.start, s.count) for s in spans), strict=True)
        )
        position = torch.arange(length)
        step = torch.arange(self.queries)
        # Beyond a row's end its own first position is read: written by then, so finite, and masked.
        inside = position < (start + count)[:, None]
        gathered = offset[:, None] + torch.where(inside, position, 0)
        last_seen = start[:, None] + torch.minimum(step, count[:, None] - 1)
        self.mask = (position <= last_seen[:, :, None])[:, None, None].to(device)
        self.gathered = gathered.flatten().to(device)
        valid = (step < count[:, None]).flatten()
        self.placed = valid.nonzero()[:, 0].to(device)
        self.written = (offset[:, None] + start[:, None] + step).flatten()[valid].to(device)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads, width = queries.shape[1:]
        kv_heads = keys.shape[1]
        seen = []
        for pool, new in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
            pool.index_copy_(1, self.written, new.transpose(0, 1))
            gathered = pool.index_select(1, self.gathered)
            seen.append(gathered.view(kv_heads, self.batch, -1, width).transpose(0, 1))
        padded = queries
        if self.queries > 1:
            padded = queries.new_zeros(self.batch * self.queries, heads, width)
            padded.index_copy_(0, self.placed, queries)
        # [B, kv_heads, group · Q, D]: the group is the slower axis, so the mask repeats along it.
        group = heads // kv_heads
        padded = padded.view(self.batch, self.queries, kv_heads, group, width).permute(0, 2, 3, 1, 4)
        shape = (self.batch, kv_heads, group * self.queries, width)
        mask = self.mask.expand(-1, 1, group, -1, -1).reshape(self.batch, 1, group * self.queries, -1)
        result = self.kernel(padded.reshape(shape), seen[0], seen[1], mask)
        result = result.view(self.batch, kv_heads, group, self.queries, width).permute(0, 3, 1, 2, 4)
        result = result.reshape(self.batch * self.queries, heads * width)
        return result if self.queries == 1 else result.index_select(0, self.placed)


def _causal_mask(span: Span) -> Tensor | None:
    """bool[count, length], True where a query may look; None for a single query, which may look everywhere."""
    if span.count == 1:
        return None
    return torch.ones(span.count, span.length, dtype=torch.bool).tril_(span.start)
