"""Clocks and arithmetic of one measurement: what a trace of token times says about speed."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Trace:
    """When the ids of one request came out. wall, cpu: seconds of `perf_counter` and `process_time` at each delta."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, count: int) -> None:
        """Note that `count` ids came out now."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.counts.append(count)

    def settle(self, decode: float) -> None:
        """Believe the engine where it says that decoding took longer than was seen.

        The first delta may be read late, when the engine's thread keeps the interpreter or the machine is busy; the
        time that is seen would then be too short and flatter the engine.
        """
        self.wall[0] = min(self.wall[0], self.wall[-1] - decode)

    @property
    def tokens(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Timed:
    """Tokens and the seconds that they took. cpu_s: of all threads of the process."""

    tokens: int
    wall_s: float
    cpu_s: float
    tokens_per_s: float

    def as_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "wall_s": self.wall_s, "cpu_s": self.cpu_s, "tokens_per_s": self.tokens_per_s}


def decode_rate(traces: list[Trace]) -> Timed | None:
    """Tokens per second while all requests were decoding.

    The window opens when the last request has its first token and closes when the first request has its last one; each
    request's rate is taken between its own first and last delta inside it, and the rates are added. With one request
    that is (tokens - 1) / (last - first). Prefill is outside, however an engine interleaves it.
    None where there is no such window.
    """
    opened = max(trace.wall[0] for trace in traces)
    closed = min(trace.wall[-1] for trace in traces)
    tokens, rate = 0, 0.0
    for trace in traces:
        inside = [index for index, moment in enumerate(trace.wall) if opened <= moment <= closed]
        if len(inside) < 2:
            return None
        made = sum(trace.counts[index] for index in inside[1:])
        tokens += made
        rate += made / (trace.wall[inside[-1]] - trace.wall[inside[0]])
    started = next(t.cpu[0] for t in traces if t.wall[0] == opened)
    ended = next(t.cpu[-1] for t in traces if t.wall[-1] == closed)
    return Timed(tokens, closed - opened, ended - started, rate)


def lead(traces: list[Trace]) -> int:
    """Most tokens that a request had before the last one had its first; to be asked for on top."""
    opened = max(trace.wall[0] for trace in traces)
    return max(
        sum(count for count, moment in zip(trace.counts, trace.wall, strict=True) if moment < opened)
        for trace in traces
    )


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes.

    On Linux from VmHWM: `ru_maxrss` also remembers the parent's size at the moment of the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
