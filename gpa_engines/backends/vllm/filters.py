"""Temperature, top-k, top-p and min-p of the one sampling rule, on torch tensors.

`gpa_engines.sampling.Sampler` in torch: the same order, the same ties, probabilities in float64. Knows no vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Filters:
    """Of one sampled request; `temperature` is above 0, and 0, 1 and 0 switch the others off."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """float32[R, V], whose softmax is what each row's next token is drawn from; -inf for what is dropped.

        scores: float32[R, V], penalised logits with -inf for what is impossible.
        """
        if 0 < self.top_k < scores.shape[-1]:
            limit = torch.topk(scores, self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < limit, -torch.inf)
        wide = scores.double()
        logs = (wide - wide.amax(-1, keepdim=True)) / self.temperature
        if self.top_p < 1:
            for row in logs:
                row[_outside_nucleus(row, self.top_p)] = -torch.inf
        if self.min_p > 0:
            # The best has probability 1 before the sum, so this is min_p times the largest of what is left.
            logs = logs.masked_fill(logs.exp() < self.min_p, -torch.inf)
        return logs.float()


def _outside_nucleus(logs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Positions of one row that top-p drops: sorted from the smallest, the tail of at most 1 - top_p.

    Of equal probabilities those of higher ids are dropped first.
    """
    possible = torch.nonzero(logs > -torch.inf).squeeze(-1).flip(0)
    weights = logs[possible].exp()
    weights, order = torch.sort(weights, stable=True)
    tail = (1 - top_p) * weights.sum()
    dropped = int(torch.searchsorted(weights.cumsum(0), tail, right=True))
    return possible[order[: min(dropped, len(order) - 1)]]
