"""Interleaved rounds, and what they say: medians, spreads, and ratios taken within a round.

In every round each measurement is taken from one contender after the other (A B C, then the next measurement), so that
what the machine does meanwhile hits all alike; a ratio divides two samples of the same round, seconds apart, and the
median of these ratios is reported. All contenders stay loaded; those that are not asked wait for a line on a pipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from gpa_conformance.bench.process import Child, ChildFailed
from gpa_conformance.bench.workload import ContenderSpec, Measurement, Workload

Progress = Callable[[str], None]
"""Told what is about to run."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one round. Seconds; peak_rss: bytes, of the process until then."""

    round: int
    measurement: Measurement
    tokens: int
    wall_s: float
    cpu_s: float
    tokens_per_s: float
    peak_rss: int

    @property
    def cpu_s_per_token(self) -> float:
        return self.cpu_s / (self.wall_s * self.tokens_per_s)


@dataclass(slots=True)
class Record:
    """One contender and what is known of it so far.

    facts: what `load` answered. logits: distance from the reference, or None. failed: why it left the race.
    """

    spec: ContenderSpec
    workload: Workload
    child: Child | None = None
    facts: dict[str, Any] | None = None
    samples: list[Sample] = field(default_factory=list)
    logits: dict[str, Any] | None = None
    idle_cpu_s: float = 0.0
    failed: str | None = None
    traceback: str = ""

    def ask(self, call: str, **arguments: Any) -> dict[str, Any] | None:
        """The child's answer, or None once the contender has failed; a failure is noted and ends the child."""
        if self.child is None:
            return None
        try:
            return self.child.ask(call, **arguments)
        except ChildFailed as failure:
            self.fail(failure)
            self.child.kill()
            self.child = None
            return None
        finally:
            if self.child is not None:
                self.idle_cpu_s = self.child.idle_cpu_s

    def fail(self, failure: ChildFailed) -> None:
        """Note why the contender left the race."""
        self.failed, self.traceback = failure.reason, failure.traceback

    def values(self, measurement: Measurement) -> dict[int, float]:
        """Tokens per second by round."""
        return {s.round: s.tokens_per_s for s in self.samples if s.measurement == measurement}


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of repeated samples."""

    median: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None for no samples."""
        known = list(values)
        return cls(median(known), min(known), max(known), len(known)) if known else None


def run_rounds(records: Sequence[Record], repeats: int, progress: Progress) -> None:
    """Warm every contender up, then take all rounds; samples and failures go into the records."""
    for record in records:
        if record.child is not None:
            progress(f"warm-up: {record.spec.name}")
            record.ask("warm_up")
    measurements = list(dict.fromkeys(m for record in records for m in record.workload.measurements()))
    for number in range(repeats):
        for measurement in measurements:
            for record in records:
                if record.child is not None and measurement in record.workload.measurements():
                    progress(f"round {number + 1} of {repeats}: {measurement}: {record.spec.name}")
                    _take(record, measurement, number)


def _take(record: Record, measurement: Measurement, number: int) -> None:
    # Seed 0 was the warm-up's: no contender has seen a round's prompts before.
    answer = record.ask(
        "measure", kind=measurement.kind, batch=measurement.batch, head=measurement.head, seed=number + 1
    )
    if answer is not None:
        record.samples.append(Sample(number, measurement, **answer))


def ratios(record: Record, measurement: Measurement, yardstick: Record) -> Spread | None:
    """How many times the yardstick's tokens per second, round by round.

    A restricted head is held against the yardstick's full head, which is the only one it has.
    """
    ours = record.values(measurement)
    theirs = yardstick.values(Measurement(measurement.kind, measurement.batch))
    return Spread.of(ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys()))


def scaling(record: Record, measurement: Measurement) -> Spread | None:
    """How many times the tokens per second of batch 1, same head, round by round; None for batch 1 itself."""
    if measurement.kind != "decode" or measurement.batch == 1:
        return None
    batched = record.values(measurement)
    alone = record.values(Measurement("decode", 1, measurement.head))
    return Spread.of(batched[number] / alone[number] for number in sorted(batched.keys() & alone.keys()))
