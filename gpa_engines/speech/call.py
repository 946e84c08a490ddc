"""What one call of the speech model gathers while its pieces run."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from gpa_engines.engine import FinishReason, GenerationUsage
from gpa_engines.speech.results import PieceReport, Progress, ProgressCallback, Stage, Timings
from gpa_engines.speech.tasks import SamplingOverrides


@dataclass(slots=True)
class Call:
    """Seed, times, reports and warnings of one call; pieces write into it by index."""

    seed: int
    progress: ProgressCallback | None = None
    pieces: int = 1
    tokens: int = 0
    encode: float = 0.0
    codec: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    finished: float | None = None
    reports: dict[int, PieceReport] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, overrides: SamplingOverrides, progress: ProgressCallback | None) -> Call:
        """A call with the caller's seed, or a fresh one that the result reports."""
        seed = overrides.get("seed")
        return cls(secrets.randbits(63) if seed is None else seed, progress)

    def piece_seed(self, index: int) -> int:
        """Pieces draw independently: piece k takes seed + k."""
        return (self.seed + index) % 2**63

    def tell(self, stage: Stage) -> None:
        if self.progress is not None:
            self.progress(Progress(stage, self.pieces, self.tokens))

    def count_tokens(self, new: int) -> None:
        """Tell that `new` tokens came out."""
        if new and self.first_token is None:
            self.first_token = time.perf_counter() - self.started
        self.tokens += new
        self.tell("generate")

    def end_piece(self, index: int, source: str, reason: FinishReason, usage: GenerationUsage, limit: int) -> None:
        """Keep a piece's report; warn if the length limit cut it off."""
        self.reports[index] = PieceReport(source, reason, usage)
        if reason == "length":
            self.notes[index] = (
                f"{shorten(source)} was cut off at max_new_tokens {limit} before the model had finished; "
                f"raise max_new_tokens"
            )

    @property
    def piece_reports(self) -> tuple[PieceReport, ...]:
        return tuple(self.reports[index] for index in sorted(self.reports))

    @property
    def warnings(self) -> tuple[str, ...]:
        """The remarks on the whole call, then the notes of its pieces."""
        return (*self.remarks, *(self.notes[index] for index in sorted(self.notes)))

    @property
    def timings(self) -> Timings:
        usages = [report.usage for report in self.reports.values()]
        total = (self.finished or time.perf_counter()) - self.started
        return Timings(
            encode=self.encode,
            prefill=sum(usage.prefill for usage in usages),
            first_token=total if self.first_token is None else self.first_token,
            decode=sum(usage.decode for usage in usages),
            codec=self.codec,
            total=total,
        )


def shorten(text: str, width: int = 40) -> str:
    """A piece's source, short enough for a message."""
    return repr(text if len(text) <= width else text[: width - 1] + "…")
