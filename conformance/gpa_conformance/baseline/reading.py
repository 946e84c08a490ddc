"""Reading a baseline folder, and refusing one that is damaged or belongs to another checkpoint.

baseline.json                 schema, who made it, of which model, what there is per case, sha256 of every other file
cases/FAMILY/NAME/prompt.json ids, stop_ids, allowed (pairs of first id and id after the last; or null), task
cases/FAMILY/NAME/logits.npy  float32[T, V], whole rows, for a short prompt; or
cases/FAMILY/NAME/top.npz     the part of each row that `gpa_conformance.reference_rows` describes
cases/FAMILY/NAME/greedy.npz  ids int64[N], margins float64[M], top5 int64[M, 5]
cases/FAMILY/NAME/answers.npz clips str[n], ids int64[N], ends int64[n]: an answer for each of n held-out utterances
cases/FAMILY/NAME/suspect.npz ids int64[n, L], columns int64[S], logits and direction float32[n, L, S]
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
from gpa_conformance.prompts import ClipCodes, Prompt
from gpa_conformance.reference_rows import FullRows, ReferenceRows, Top, TopRows
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.engine import FinishReason

SCHEMA = "gpa-conformance-baseline/1"
DOCUMENT = "baseline.json"
ADVICE = "make a new one with: gpa-conformance baseline --model DIR --out FOLDER"


class BaselineError(GpaError):
    """A baseline that is missing, damaged, of another checkpoint, or without what is asked for."""


@dataclass(frozen=True, slots=True)
class GreedyReference:
    """The reference's greedy answer to a prompt.

    ids: int64[N], without a stop id. margins: float64[M], difference between the two highest possible logits (after the
    penalty, where the case has one) when each id was chosen; M is N, or N + 1 where a stop id was chosen at the end.
    top5: int64[M, 5], the best possible ids, best first; -1 where there are fewer.
    """

    prompt: Prompt
    ids: NDArray[np.int64]
    margins: NDArray[np.float64]
    top5: NDArray[np.int64]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class CodecReference:
    """What the float32 torch codec makes of one clip.

    tokens, voice: its codes. *_stable: bool per code, False for one that changed under noise 100 dB below the clip: an
    implementation may differ there. waveform: the semantic codes decoded in the clip's own voice.
    """

    clip: str
    tokens: AudioTokens
    voice: Voice
    semantic_stable: NDArray[np.bool_]
    glm_stable: NDArray[np.bool_]
    voice_stable: NDArray[np.bool_]
    waveform: Waveform

    @property
    def codes(self) -> ClipCodes:
        """What prompts are built from."""
        return ClipCodes(self.tokens, self.voice)


@dataclass(frozen=True, slots=True)
class SuspectReference:
    """How a mistake moves the reference's logits; see `gpa_conformance.families.suspects`.

    mistake: in words. prompts: n prompts of L ids. columns: int64[S], the ids whose logits are kept. logits, direction:
    float32[n, L, S], the reference's, and how much the mistake adds to them.
    """

    mistake: str
    prompts: tuple[tuple[int, ...], ...]
    columns: NDArray[np.int64]
    logits: NDArray[np.float32]
    direction: NDArray[np.float32]

    @property
    def positions(self) -> int:
        """n * L."""
        return sum(map(len, self.prompts))


@dataclass(frozen=True, slots=True)
class LogitsReference:
    """The reference's logits of one prompt, read in blocks.

    kind: "full" (whole rows) or "top" (see `gpa_conformance.reference_rows`). positions: int64[P], the positions of the
    prompt that are kept, ascending; all of them unless the case says otherwise. vocab_size: V.
    """

    prompt: Prompt
    positions: NDArray[np.int64]
    vocab_size: int
    kind: Literal["full", "top"]
    file: Path

    def blocks(self, rows: int = 32) -> Iterator[ReferenceRows]:
        """The kept rows in order, at most `rows` at a time."""
        if self.kind == "full":
            logits = np.load(self.file, mmap_mode="r", allow_pickle=False)
            for start in range(0, len(self.positions), rows):
                part = slice(start, start + rows)
                yield FullRows(self.positions[part], np.array(logits[part]))
            return
        arrays = load_arrays(self.file)
        for start in range(0, len(self.positions), rows):
            yield _top_rows(arrays, slice(start, start + rows))


@dataclass(frozen=True, slots=True)
class Baseline:
    """A baseline folder. path: the folder. document: baseline.json as it stands."""

    path: Path
    document: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Baseline:
        """Read and verify a folder; raises BaselineError naming the file that is missing or damaged."""
        folder = Path(folder).expanduser()
        document = _read_document(folder / DOCUMENT)
        for name, facts in document["files"].items():
            _verify(folder, name, facts)
        return cls(folder, document)

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Raise BaselineError, naming file and both hashes, unless the baseline was made of this checkpoint.

        Compares the parts that `checkpoint` was opened with: a machine that has only the language model can be tested.
        """
        recorded: Mapping[str, str] = self.document["model"]["files"]
        found = checkpoint.fingerprint()
        for name in sorted(found):
            if recorded.get(name) != found[name]:
                raise BaselineError(
                    f"baseline {self.path} was made of another checkpoint than {checkpoint.root}: "
                    f"{name} has sha256 {found[name]}, in the baseline {recorded.get(name, 'there is no such file')}; "
                    f"{ADVICE}"
                )
        absent = [name for name in recorded if name.partition("/")[0] == "lm" and name not in found]
        if absent:
            raise BaselineError(
                f"baseline {self.path} was made of another checkpoint than {checkpoint.root}: {absent[0]} has sha256 "
                f"{recorded[absent[0]]} in the baseline, and is not in the checkpoint; {ADVICE}"
            )

    def missing(self, case: Case) -> str | None:
        """Why the baseline cannot serve a case, in words; None when it can."""
        if case.id in self.document["omitted"]:
            return f"the baseline was made without it: {self.document['omitted'][case.id]}"
        entry = self.document["cases"].get(case.id)
        if entry is None:
            return "the baseline was made without it"
        if entry["digest"] != case.digest:
            return "the baseline was made for another version of the case"
        return next((f"{name}: {self.document['omitted'][name]}" for name in case.prompts if self._omits(name)), None)

    def prompt(self, case_id: str) -> Prompt:
        """The prompt of a case. Raises BaselineError when the baseline has none."""
        values = json.loads(self._file(case_id, "prompt").read_text(encoding="utf-8"))
        allowed = values["allowed"]
        return Prompt(
            ids=tuple(values["ids"]),
            stop_ids=tuple(values["stop_ids"]),
            allowed=None if allowed is None else tuple(range(start, stop) for start, stop in allowed),
            task=values["task"],
        )

    def ids(self, case_id: str) -> NDArray[np.int64]:
        """int64[T], the ids of `prompt`."""
        return np.asarray(self.prompt(case_id).ids, np.int64)

    def logits(self, case_id: str) -> LogitsReference:
        """The logits of a case. Raises BaselineError when the baseline has none."""
        file = self._file(case_id, "logits")
        prompt = self.prompt(case_id)
        vocab_size = self.document["model"]["vocab_size"]
        if file.suffix == ".npy":
            return LogitsReference(prompt, np.arange(len(prompt.ids)), vocab_size, "full", file)
        return LogitsReference(prompt, load_arrays(file, "positions")["positions"], vocab_size, "top", file)

    def greedy(self, case_id: str) -> GreedyReference:
        """The greedy answer of a case. Raises BaselineError when the baseline has none."""
        arrays = load_arrays(self._file(case_id, "greedy"))
        reason: FinishReason = self.document["cases"][case_id]["finish_reason"]
        return GreedyReference(self.prompt(case_id), arrays["ids"], arrays["margins"], arrays["top5"], reason)

    def suspect(self, case_id: str) -> SuspectReference:
        """The direction of a mistake. Raises BaselineError when the baseline has none."""
        arrays = load_arrays(self._file(case_id, "suspect"))
        return SuspectReference(
            mistake=self.document["cases"][case_id]["mistake"],
            prompts=tuple(tuple(ids) for ids in arrays["ids"].tolist()),
            columns=arrays["columns"],
            logits=arrays["logits"],
            direction=arrays["direction"],
        )

    def spoken(self, case: Case) -> dict[str, tuple[int, ...]]:
        """Ids of the answers to a case of the family "speech", by the path of the utterance's clip.

        Empty where the baseline was made without the case, or for another version of it.
        """
        if self.missing(case) or not self.document["cases"][case.id].get("answers"):
            return {}
        arrays = load_arrays(self._file(case.id, "answers"))
        parts = np.split(arrays["ids"], arrays["ends"][:-1])
        return {str(clip): tuple(ids.tolist()) for clip, ids in zip(arrays["clips"], parts, strict=True)}

    def codec(self, clip: str) -> CodecReference:
        """The codes and the audio of a clip. Raises BaselineError when the baseline has none."""
        name = self.document["clips"].get(clip)
        if name is None:
            raise BaselineError(f"baseline {self.path} has no codes of the clip {clip!r}; {ADVICE}")
        arrays = load_arrays(self.path / name)
        return CodecReference(
            clip=clip,
            tokens=AudioTokens(arrays["semantic"], arrays["glm"], float(arrays["duration"])),
            voice=Voice(tuple(arrays["voice"].tolist()), clip),
            semantic_stable=arrays["semantic_stable"],
            glm_stable=arrays["glm_stable"],
            voice_stable=arrays["voice_stable"],
            waveform=Waveform(arrays["pcm"]),
        )

    def _omits(self, case_id: str) -> bool:
        return case_id in self.document["omitted"]

    def _file(self, case_id: str, thing: str) -> Path:
        entry = self.document["cases"].get(case_id, {})
        if not entry.get(thing):
            raise BaselineError(f"baseline {self.path} has no {thing} of the case {case_id!r}; {ADVICE}")
        return self.path / entry[thing]


def checksum(document: Mapping[str, Any]) -> str:
    """sha256 of baseline.json without its own `checksum`."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def load_arrays(file: Path, *names: str) -> dict[str, NDArray]:
    """Arrays of an .npz, all or those named."""
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names or arrays.files}


def _top_rows(arrays: Mapping[str, NDArray], part: slice) -> TopRows:
    def top(prefix: str) -> Top:
        return Top(
            ids=arrays[f"{prefix}_ids"][part].astype(np.int64),
            logits=arrays[f"{prefix}_logits"][part],
            log_normaliser=arrays[f"{prefix}_log_normaliser"][part],
            count=int(arrays[f"{prefix}_count"]),
            sample_ids=arrays[f"{prefix}_sample_ids"].astype(np.int64),
            sample=arrays[f"{prefix}_sample"][part],
        )

    return TopRows(
        positions=arrays["positions"][part],
        top=top("top"),
        allowed=top("allowed") if "allowed_ids" in arrays else None,
        mean=arrays["mean"][part],
        norm=arrays["norm"][part],
    )


def _read_document(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise BaselineError(f"{file} is missing: {file.parent} is not a baseline; {ADVICE}")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaselineError(f"{file}: {error.strerror or error}") from error
    except ValueError as error:
        raise BaselineError(f"{file} is damaged: it is not JSON ({error}); {ADVICE}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise BaselineError(f"{file} has schema {schema!r}; this program reads {SCHEMA!r}; {ADVICE}")
    if document.get("checksum") != checksum(document):
        raise BaselineError(f"{file} is damaged: its content does not fit its own checksum; {ADVICE}")
    return document


def _verify(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    file = folder / name
    try:
        size = file.stat().st_size
        if size != facts["bytes"]:
            raise BaselineError(f"{file} is damaged: it has {size} bytes, expected {facts['bytes']}; {ADVICE}")
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise BaselineError(f"{file} is missing from the baseline; {ADVICE}") from error
    except OSError as error:
        raise BaselineError(f"{file}: {error.strerror or error}") from error
    if found != facts["sha256"]:
        raise BaselineError(f"{file} is damaged: its sha256 is {found}, expected {facts['sha256']}; {ADVICE}")
