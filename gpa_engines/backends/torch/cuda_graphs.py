"""Decode steps as CUDA graphs: one launch per step, not hundreds. Not verified on hardware yet, so off by default.

Everything that knows of CUDA graphs is in this file. A graph needs fixed shapes: rows are padded to a power of two with
rows that read and write the cache's spare position, and key counts to the bucket of :class:`PaddedPlan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpa_engines.backends.torch.attention import PaddedPlan, Span
from gpa_engines.backends.torch.kv_cache import KVCache
from gpa_engines.backends.torch.model import Qwen3


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """One decode step of fixed shape: ids, positions: int64[B]."""

    ids: Tensor
    positions: Tensor
    plan: PaddedPlan

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What changes from step to step."""
        return (self.ids, self.positions, self.plan.mask, self.plan.gathered, self.plan.written)


def pad_decode(cache: KVCache, ids: Sequence[int], spans: Sequence[Span]) -> DecodeInputs:
    """One new id per span, padded to a power of two of rows."""
    batch = 1 << (len(spans) - 1).bit_length()
    padding = batch - len(spans)
    spans = [*spans, *[Span(cache.scratch, 0, 1)] * padding]
    device = cache.keys.device
    return DecodeInputs(
        torch.tensor([*ids, *[0] * padding], device=device),
        torch.tensor([span.start for span in spans], device=device),
        PaddedPlan(cache, spans),
    )


class CudaGraphs:
    """Captured decode steps by shape."""

    def __init__(self, model: Qwen3, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.captured: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, DecodeInputs, Tensor]] = {}

    def forward(self, ids: Sequence[int], spans: Sequence[Span]) -> Tensor:
        """float32[len(spans), hidden], before the final norm."""
        inputs = pad_decode(self.cache, ids, spans)
        shape = tuple(tensor.shape for tensor in inputs.tensors)
        if shape not in self.captured:
            self.captured[shape] = self._capture(inputs)
        graph, static, hidden = self.captured[shape]
        for target, source in zip(static.tensors, inputs.tensors, strict=True):
            target.copy_(source)
        graph.replay()
        return hidden[: len(spans)]

    def _capture(self, inputs: DecodeInputs) -> tuple[torch.cuda.CUDAGraph, DecodeInputs, Tensor]:
        """As torch's documentation has it: first eagerly on a side stream, so that libraries set themselves up."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.model.forward(inputs.ids, inputs.positions, inputs.plan)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = self.model.forward(inputs.ids, inputs.positions, inputs.plan)
        return graph, inputs, hidden
