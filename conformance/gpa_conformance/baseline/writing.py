"""Making a baseline from an engine and a codec (torch, CPU, float32; the caller creates them)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gpa_codecs.codec import SpeechCodec
from gpa_conformance.baseline.reading import Baseline
from gpa_conformance.cases import Case
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.engine import Engine

Progress = Callable[[str, int, int], None]
"""What is being done now ("logits/ascend-1"), how many things are done, how many there are."""


async def write_baseline(
    checkpoint: Checkpoint,
    out: str | Path,
    engine: Engine,
    codec: SpeechCodec | None,
    cases: Sequence[Case],
    progress: Progress | None = None,
) -> Baseline:
    """Record the answers of `engine` and `codec` to `cases` (and the prompts that they refer to) in the new folder `out`.

    codec: None leaves out what needs one; the baseline says so. The folder appears whole or not at all. Raises GpaError
    when `out` exists, cannot be written, or the engine's logits are not finite.
    """
    raise NotImplementedError
