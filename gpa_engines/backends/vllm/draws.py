"""Filters and draw of the one sampling rule, on torch tensors: `gpa_engines.sampling.Sampler`, many rows at a time.

The same order, the same ties, probabilities in float64, and the same random numbers, so that a seed gives the tokens
that it gives on engines that use the Sampler, where the logits agree. Knows no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Filters:
    """Of one sampled request; `temperature` is above 0, and 0, 1 and 0 switch the others off."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """float64[R, V], in proportion to the probabilities that each row's next token is drawn with, at most 1.

        scores: float32[R, V], penalised logits with -inf for what is impossible.
        """
        if 0 < self.top_k < scores.shape[-1]:
            limit = torch.topk(scores, self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < limit, -torch.inf)
        wide = scores.double()
        weights = ((wide - wide.amax(-1, keepdim=True)) / self.temperature).exp()
        if self.top_p < 1:
            for row in weights:
                row[_outside_nucleus(row, self.top_p)] = 0
        if self.min_p > 0:
            # The best always stays and weighs 1.
            weights.masked_fill_(weights < self.min_p, 0)
        return weights


def uniform(seed: int, step: int) -> float:
    """The random number in [0, 1) for the answer's token `step`, counted from 0.

    It is told by seed and step alone: whatever else vLLM computes for a request, such as the parts of a prompt or an
    answer anew, uses none up.
    """
    bits = np.random.PCG64(seed)
    bits.advance(step)
    return np.random.Generator(bits).random()


def draw(weights: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """int64[R], the id drawn from each row of weights: float64[R, V]."""
    cumulative = weights.cumsum(-1)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=weights.device)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True)
    # The sum may round below the draw; a zero weight is never reached from below.
    places = torch.arange(weights.shape[-1], device=weights.device)
    last = torch.where(weights > 0, places, 0).amax(-1, keepdim=True)
    return torch.minimum(drawn, last).squeeze(-1)


def _outside_nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Positions of one row that top-p drops: sorted from the smallest, the tail of at most 1 - top_p.

    Of equal weights those of higher ids are dropped first.
    """
    possible = torch.nonzero(weights > 0).squeeze(-1).flip(0)
    ascending, order = torch.sort(weights[possible], stable=True)
    tail = (1 - top_p) * ascending.sum()
    dropped = int(torch.searchsorted(ascending.cumsum(0), tail, right=True))
    return possible[order[: min(dropped, len(order) - 1)]]
