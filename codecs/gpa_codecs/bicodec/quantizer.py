"""BiCodec's two quantisers: a factorised codebook for semantic codes, finite scalar quantisation for global ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_FSQ_EPS = 1e-3  # Keeps the outermost levels reachable (Mentzer et al. 2023, reference implementation).


def nearest_by_angle(latents: Tensor, codebook: Tensor) -> Tensor:
    """Codes of latents (B, D, T) in a codebook (K, D): int64 (B, T).

    Distances are between unit vectors (Yu et al. 2021), in the arithmetic of Spark-TTS; the first of equals wins.
    """
    vectors = F.normalize(latents.transpose(1, 2).flatten(0, 1))
    entries = F.normalize(codebook)
    squares = vectors.square().sum(1, keepdim=True)
    distances = squares - 2 * vectors @ entries.T + entries.square().sum(1)
    return distances.argmin(dim=1).view(len(latents), -1)


def fsq_codes(values: Tensor, levels: Sequence[int]) -> Tensor:
    """Codes of values (..., len(levels)): int64 (...), the first value's level counting least."""
    counts = torch.tensor(levels, dtype=values.dtype, device=values.device)
    half_range = (counts - 1) * (1 + _FSQ_EPS) / 2
    offset = torch.where(counts % 2 == 0, 0.5, 0.0)
    bounded = (values + torch.atanh(offset / half_range)).tanh() * half_range - offset
    digits = bounded.round() + counts // 2
    return (digits.long() * _place_values(levels, values.device)).sum(dim=-1)


def fsq_values(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Values of codes int64 (...): float32 (..., len(levels)) in [-1, 1)."""
    counts = torch.tensor(levels, device=codes.device)
    digits = codes.unsqueeze(-1) // _place_values(levels, codes.device) % counts
    half = counts // 2
    return (digits - half) / half


def _place_values(levels: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([math.prod(levels[:place]) for place in range(len(levels))], device=device)
