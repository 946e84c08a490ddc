"""The reference's answers, in a folder that can be carried to the machine under test; see `reading` for its layout.

Reading needs no engine and no torch; writing takes them from the caller.
"""

from gpa_conformance.baseline.reading import (
    Baseline,
    BaselineError,
    CodecReference,
    GreedyReference,
    LogitsReference,
    SuspectReference,
)
from gpa_conformance.baseline.writing import write_baseline

__all__ = [
    "Baseline",
    "BaselineError",
    "CodecReference",
    "GreedyReference",
    "LogitsReference",
    "SuspectReference",
    "write_baseline",
]
