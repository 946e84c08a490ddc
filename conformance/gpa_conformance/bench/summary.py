"""What repeated timings say: mean, median, 99th percentile, extremes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of `count` samples, in the samples' unit."""

    mean: float
    median: float
    p99: float
    min: float
    max: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary | None:
        """None for no samples."""
        if not samples:
            return None
        return cls(
            fmean(samples), percentile(samples, 50), percentile(samples, 99), min(samples), max(samples), len(samples)
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the samples lie, interpolated linearly between the two nearest.

    Type 7 of Hyndman & Fan 1996 ("Sample Quantiles in Statistical Packages"), as NumPy's default: sample k of n sorted
    ones, counted from 0, stands at 100 k / (n - 1) percent. With fewer than 101 samples the 99th percentile lies
    between the two slowest; the Ascend report's, which is below its maximum, was taken this way too.
    """
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
