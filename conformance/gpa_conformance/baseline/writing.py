"""Making a baseline from an engine and a codec (torch, CPU, float32; the caller creates them)."""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np

from gpa_codecs.codec import SpeechCodec
from gpa_conformance.baseline.answers import (
    Greedy,
    clip_arrays,
    greedy_answer,
    plain_answers,
    reference_logits,
    top_arrays,
)
from gpa_conformance.baseline.mistakes import OpenEngine, describe, mistake_arrays, unchanged
from gpa_conformance.baseline.reading import DOCUMENT, SCHEMA, Baseline, BaselineError, checksum
from gpa_conformance.bench.machine import machine_facts
from gpa_conformance.cases import Case, clip_file, load_cases
from gpa_conformance.prompts import ClipCodes, Prompt, build_prompt
from gpa_conformance.reference_rows import keep_top
from gpa_conformance.speech.material import NO_DOMAIN, UTTERANCES, SpeechMaterial
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.checkpoint.speech_domain import find_speech_domain
from gpa_engines.engine import Engine, GenerationRequest

FULL_BYTES = 16 * 2**20
"""Whole rows are kept of a prompt whose logits are no larger than this; else their top (4 MB instead of 140 at 200
positions of the released vocabulary)."""

Progress = Callable[[str, int, int], None]
"""What is being done now ("logits/ascend-1"), how many things are done, how many there are."""


async def write_baseline(
    checkpoint: Checkpoint,
    out: str | Path,
    engine: Engine,
    open_codec: Callable[[], SpeechCodec] | None,
    cases: Sequence[Case],
    progress: Progress | None = None,
    open_engine: OpenEngine | None = None,
    *,
    utterances: int = UTTERANCES,
) -> Baseline:
    """Record the answers of an engine and a codec to `cases` (and the prompts that they use) in the new folder `out`.

    open_codec: called once, and only if a case needs a codec, which is dropped before the engine runs, so that the two
    do not share the memory; None leaves those cases out, and the baseline says so. open_engine: opens another engine
    like `engine`, for cases about a mistake in config.json; None leaves these out. utterances: how many of the
    checkpoint's speech domain are recorded. The folder appears whole or not at all. Raises BaselineError when `out` has
    content or cannot be written, and for NaN or an engine that contradicts itself.
    """
    out = Path(out).expanduser()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BaselineError(f"{out} exists already; remove it or choose another --out")
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        writer = _Writer(temporary, checkpoint, engine, open_codec, _with_references(cases), open_engine, utterances)
        await writer.write(progress or (lambda what, done, total: None))
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, out)
    except OSError as error:
        raise BaselineError(f"baseline {out}: {error.strerror or error}; nothing was kept") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return Baseline.open(out)


class _Writer:
    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        engine: Engine,
        open_codec: Callable[[], SpeechCodec] | None,
        cases: Sequence[Case],
        open_engine: OpenEngine | None,
        utterances: int,
    ) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.engine = engine
        self.open_codec = open_codec
        self.open_engine = open_engine
        self.cases = cases
        self.space = checkpoint.token_space()
        self.domain = find_speech_domain(checkpoint.root)
        self.utterances = utterances
        self.spoken: dict[str, list[GenerationRequest]] = {}
        self.spoken_clips: list[str] = []
        self.codes: dict[str, ClipCodes] = {}
        self.clips: dict[str, str] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.omitted: dict[str, str] = {}

    async def write(self, progress: Progress) -> None:
        started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        kept = [case for case in self.cases if not self._omit(case)]
        clips = sorted(set().union(*(_clips(case, self.cases) for case in kept)))
        spoken = [case for case in kept if _is_recorded_speech(case)]
        total = len(clips) + len(kept) + 1
        codec_name = self._use_codec(clips, spoken, lambda what, done: progress(what, done, total))
        for done, case in enumerate(kept, len(clips)):
            progress(case.id, done, total)
            self.entries[case.id] = await self._write_case(case)
        progress("hashes of the checkpoint", total - 1, total)
        document = {
            "schema": SCHEMA,
            "made": {
                "started": started,
                "seconds": time.monotonic() - clock,
                "engine": asdict(self.engine.info) | {"capabilities": sorted(self.engine.info.capabilities)},
                "codec": codec_name,
                "machine": machine_facts(),
            },
            "model": {
                "name": self.checkpoint.root.resolve().name,
                "vocab_size": self.engine.info.vocab_size,
                "files": self.checkpoint.fingerprint(),
            },
            "cases": self.entries,
            "clips": self.clips,
            "omitted": self.omitted,
            "files": {_relative(file, self.folder): _facts(file) for file in _files(self.folder)},
        }
        _write_json(self.folder / DOCUMENT, document | {"checksum": checksum(document)})
        progress("done", total, total)

    def _omit(self, case: Case) -> bool:
        """Note why a case cannot be recorded, if so."""
        needs = _length(case, self.cases) + int(case.spec.get("new_tokens", 0))
        if self.open_codec is None and (clips := _clips(case, self.cases)):
            self.omitted[case.id] = f"no codec for the clip {min(clips)}"
        elif case.family == "speech" and self.domain is None:
            self.omitted[case.id] = NO_DOMAIN
        elif self.open_codec is None and case.family == "speech":
            self.omitted[case.id] = "no codec for the recordings of the speech domain"
        elif case.kind == "suspect" and self.open_engine is None:
            self.omitted[case.id] = "no second engine to make the mistake with"
        elif case.kind == "suspect" and (reason := unchanged(self.checkpoint, case.spec["change"])):
            self.omitted[case.id] = reason
        elif needs > self.engine.info.max_context:
            self.omitted[case.id] = f"it needs {needs} positions; the model has {self.engine.info.max_context}"
        return case.id in self.omitted

    def _use_codec(
        self, names: Sequence[str], spoken: Sequence[Case], progress: Callable[[str, int], None]
    ) -> str | None:
        """Record the clips and build the prompts of the family "speech"; the codec's name, None where none was needed.

        The codec is gone when this returns.
        """
        if self.open_codec is None or not (names or spoken):
            return None
        codec = self.open_codec()
        for done, name in enumerate(names):
            progress(f"clip {name}", done)
            self.codes[name], arrays = clip_arrays(codec, clip_file(name))
            self.clips[name] = f"clips/{name}.npz"
            self._save(self.clips[name], **arrays)
        if spoken:
            progress("recordings of the speech domain", len(names))
            self._build_spoken(spoken, codec)
        name = type(codec).__name__
        del codec
        gc.collect()  # its parts refer to each other
        return name

    def _build_spoken(self, cases: Sequence[Case], codec: SpeechCodec) -> None:
        """What each case asks of the utterances."""
        assert self.domain is not None
        material = SpeechMaterial(self.domain, self.utterances, self.space, lambda: codec, recognise=False)
        self.spoken_clips = [item.utterance.clip.path for item in material.items]
        for case in cases:
            self.spoken[case.id] = material.requests(case.spec["task"], case.spec["sampling"])

    async def _write_case(self, case: Case) -> dict[str, Any]:
        entry: dict[str, Any] = {"title": case.title, "digest": case.digest}
        if case.kind == "suspect":
            assert self.open_engine is not None
            entry["suspect"] = f"cases/{case.id}/suspect.npz"
            entry["mistake"] = describe(self.checkpoint, case.spec["change"])
            self._save(entry["suspect"], **await mistake_arrays(self.checkpoint, self.engine, self.open_engine, case))
        if case.id in self.spoken:
            given = await plain_answers(self.engine, self.spoken[case.id])
            ids, ends = np.concatenate([[], *given]).astype(np.int64), np.cumsum([len(each) for each in given])
            entry["answers"] = f"cases/{case.id}/answers.npz"
            self._save(
                entry["answers"], clips=np.array(self.spoken_clips, np.str_), ids=ids, ends=ends.astype(np.int64)
            )
        if case.prompt is None:
            return entry
        prompt = build_prompt(case.prompt, self.space, self.codes.__getitem__, self.cases)
        folder = f"cases/{case.id}"
        (self.folder / folder).mkdir(parents=True)
        entry["prompt"] = f"{folder}/prompt.json"
        _write_json(self.folder / entry["prompt"], _prompt_document(prompt))
        if case.kind == "prefill":
            entry["logits"] = await self._write_logits(case, prompt, folder)
        if case.kind == "greedy":
            greedy: Greedy = await greedy_answer(self.engine, case, prompt)
            entry["greedy"] = f"{folder}/greedy.npz"
            entry["finish_reason"] = greedy.finish_reason
            self._save(entry["greedy"], ids=greedy.ids, margins=greedy.margins, top5=greedy.top5)
        return entry

    async def _write_logits(self, case: Case, prompt: Prompt, folder: str) -> str:
        positions = scored_positions(case, len(prompt.ids))
        logits = await reference_logits(self.engine, case, prompt.ids, positions)
        if "every" not in case.spec and logits.nbytes <= FULL_BYTES:
            np.save(self.folder / folder / "logits.npy", logits, allow_pickle=False)
            return f"{folder}/logits.npy"
        rows = keep_top(logits, positions, prompt.candidates())
        self._save(f"{folder}/top.npz", **top_arrays(rows))
        return f"{folder}/top.npz"

    def _save(self, name: str, **arrays: Any) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **arrays)


def scored_positions(case: Case, length: int) -> np.ndarray:
    """int64[P]: the positions of a prompt of `length` ids that a case scores."""
    if "every" not in case.spec:
        return np.arange(length)
    tail = np.arange(max(0, length - case.spec["last"]), length)
    return np.union1d(np.arange(0, length, case.spec["every"]), tail)


def _with_references(cases: Sequence[Case]) -> list[Case]:
    """`cases` and those whose prompts they use, from the package where they are not among them."""
    known = {case.id: case for case in (*load_cases(), *cases)}
    found: dict[str, Case] = {}

    def add(case: Case) -> None:
        if case.id not in found:
            found[case.id] = case
            for name in case.references:
                add(known[name])

    for case in cases:
        add(case)
    return list(found.values())


def _clips(case: Case, cases: Sequence[Case]) -> set[str]:
    """Names of the clips that a case needs codes of, through its references too."""
    own = {source[key] for source in (case.spec, case.prompt or {}) for key in ("clip", "voice") if key in source}
    return own.union(*(_clips(each, cases) for each in cases if each.id in case.references))


def _is_recorded_speech(case: Case) -> bool:
    """Greedy answers of the family "speech"; draws are not compared with draws."""
    return case.family == "speech" and "task" in case.spec and not case.spec["sampling"].get("temperature")


def _length(case: Case, cases: Sequence[Case]) -> int:
    """Ids of the longest patterned prompt of a case; prompts of text and clips are short."""
    own = int((case.prompt or {}).get("length", 0))
    return max([own, *(_length(each, cases) for each in cases if each.id in case.references)])


def _prompt_document(prompt: Prompt) -> dict[str, Any]:
    allowed = None if prompt.allowed is None else [[ids.start, ids.stop] for ids in prompt.allowed]
    return {"task": prompt.task, "ids": prompt.ids, "stop_ids": prompt.stop_ids, "allowed": allowed}


def _write_json(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": file_digest(content, "sha256").hexdigest()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
