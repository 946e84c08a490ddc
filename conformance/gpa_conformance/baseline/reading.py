"""Reading a baseline folder, and refusing one that is damaged or belongs to another checkpoint.

baseline.json                 schema, who made it, of which model, what there is per case, sha256 of every other file
cases/FAMILY/NAME/prompt.json ids, stop_ids, allowed (pairs of first id, id after the last; or null), task
cases/FAMILY/NAME/logits.npy  float32[T, V], whole rows, for a short prompt; or
cases/FAMILY/NAME/top.npz     the part of each row that `gpa_conformance.reference_rows` describes
cases/FAMILY/NAME/greedy.npz  ids int64[N], margins float64[N], top5 int64[N, 5]
clips/NAME.npz                semantic, glm, voice int64; semantic_stable, glm_stable, voice_stable bool; pcm float32
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.audio import Waveform
from gpa_codecs.codec import AudioTokens, Voice
from gpa_codecs.errors import GpaError
from gpa_conformance.cases import Case
from gpa_conformance.prompts import Prompt
from gpa_conformance.reference_rows import FullRows, ReferenceRows, Top, TopRows
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.engine import FinishReason

SCHEMA = "gpa-conformance-baseline/1"
DOCUMENT = "baseline.json"
ADVICE = "make one with: gpa-conformance baseline --model DIR --out FOLDER"


@dataclass(frozen=True, slots=True)
class GreedyReference:
    """The reference's greedy answer to a prompt.

    ids: int64[N], without a stop id. margins: float64[N], nats between the best and the second-best possible id (after the
    penalty, where the case has one). top5: int64[N, 5], the best possible ids, best first; -1 where there are fewer.
    """

    prompt: Prompt
    ids: NDArray[np.int64]
    margins: NDArray[np.float64]
    top5: NDArray[np.int64]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class CodecReference:
    """What the float32 torch codec makes of one clip.

    tokens, voice: its codes. *_stable: bool, False for a code that changed under noise of 1e-5 of the clip's level: an
    engine may differ there. pcm: the semantic codes decoded in the clip's own voice.
    """

    clip: str
    tokens: AudioTokens
    voice: Voice
    semantic_stable: NDArray[np.bool_]
    glm_stable: NDArray[np.bool_]
    voice_stable: NDArray[np.bool_]
    waveform: Waveform


class LogitsReference:
    """The reference's logits of one prompt, read in blocks.

    kind: "full" (whole rows) or "top" (see `gpa_conformance.reference_rows`). positions: int64[P], the positions of the
    prompt that are kept, ascending; all of them for a short prompt. vocab_size: V.
    """

    def __init__(self, prompt: Prompt, file: Path, positions: NDArray[np.int64], vocab_size: int) -> None:
        self.prompt = prompt
        self.positions = positions
        self.vocab_size = vocab_size
        self.kind: Literal["full", "top"] = "full" if file.suffix == ".npy" else "top"
        self._file = file

    def blocks(self, rows: int = 32) -> Iterator[ReferenceRows]:
        """The kept rows in order, at most `rows` at a time."""
        raise NotImplementedError


class Baseline:
    """A baseline folder. path: the folder. document: baseline.json as it stands."""

    path: Path
    document: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Baseline:
        """Read and verify a folder; raises GpaError naming the file that is missing or damaged."""
        raise NotImplementedError

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Raise GpaError, naming file and both hashes, unless the baseline was made of this checkpoint."""
        raise NotImplementedError

    def missing(self, case: Case) -> str | None:
        """Why the baseline cannot serve a case (not in it, another definition), in words; None when it can."""
        raise NotImplementedError

    def prompt(self, case_id: str) -> Prompt:
        """The prompt of a case. Raises GpaError when the baseline has none."""
        raise NotImplementedError

    def ids(self, case_id: str) -> NDArray[np.int64]:
        """int64[T], the ids of `prompt`."""
        return np.asarray(self.prompt(case_id).ids, np.int64)

    def logits(self, case_id: str) -> LogitsReference:
        """The logits of a case. Raises GpaError when the baseline has none."""
        raise NotImplementedError

    def greedy(self, case_id: str) -> GreedyReference:
        """The greedy answer of a case. Raises GpaError when the baseline has none."""
        raise NotImplementedError

    def codec(self, clip: str) -> CodecReference:
        """The codes and the audio of a clip. Raises GpaError when the baseline has none."""
        raise NotImplementedError
