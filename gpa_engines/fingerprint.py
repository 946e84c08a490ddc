"""What a model answers to a few fixed prompts: enough to tell whether two engines hold the same weights.

It is a check at the door, not a proof: it notices another checkpoint, another vocabulary, a wrong dtype or a broken
conversion, and says nothing of ids that its prompts do not hold. gpa-conformance is the proof.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gpa_codecs.errors import BackendError, CheckpointError
from gpa_codecs.files import write_atomically
from gpa_engines.engine import Engine, GivesRows
from gpa_engines.registry import create_engine

SCHEMA = "gpa-fingerprint/1"

FILE = "fingerprint.json"
"""Where the fingerprint of a checkpoint is looked for, in its folder."""

PROMPTS = 4
LENGTH = 24
TOP = 20
"""Best ids that are kept of each prompt; a vLLM server gives no more unless it was started for it."""

LEAST_SHARED = 0.5
"""Part of the best ids that must be the same. Two models share TOP / V of them by chance; on random weights, whose best
ids lie closest, bfloat16 keeps 78 of 80 beside float32 and int8 76."""

FARTHEST = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.3}
"""How far the shared scores may be apart, relative to how much they differ among each other, by the coarser dtype.
Measured on random weights of both sizes beside float32: bfloat16 0.07, float16 0.01, int8 0.17."""

FARTHEST_QUANTISED = 0.6


@runtime_checkable
class GivesTopScores(Protocol):
    """An engine that can say the best ids without giving whole rows of logits."""

    async def top_scores(self, ids: Sequence[int], count: int) -> dict[int, float]:
        """The `count` best ids after `ids` with their logits or log-probabilities, so up to a constant."""
        ...


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """source: what it was taken of, for messages. tops: per prompt the best ids and their scores, up to a constant."""

    source: str
    dtype: str
    vocab_size: int
    tops: tuple[Mapping[int, float], ...]

    @classmethod
    async def take(cls, engine: Engine) -> Fingerprint:
        """Ask an engine. Raises RequestError where it fails, BackendError where it has part of the vocabulary."""
        info = engine.info
        source = f"{info.backend} on {info.device}"
        if info.logit_ids is not None:
            raise BackendError(f"{source} has a part of the vocabulary; a fingerprint needs all of it")
        tops = [await _top_scores(engine, prompt) for prompt in prompts(info.vocab_size)]
        return cls(source, info.dtype, info.vocab_size, tuple(tops))

    @classmethod
    def of_model(cls, backend: str, folder: Path, options: Mapping[str, Any]) -> Fingerprint:
        """Load an engine, ask it and close it. Not to be called on a thread that runs an event loop."""
        engine = create_engine(backend, folder, **options)

        async def take() -> Fingerprint:
            try:
                return await cls.take(engine)
            finally:
                await engine.close()

        return asyncio.run(take())

    @classmethod
    def read(cls, path: Path) -> Fingerprint:
        """Raises CheckpointError for a file that is missing or none."""
        remedy = "record it anew with gpa-run fingerprint"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}; {remedy}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}; {remedy}") from error
        try:
            if values["schema"] != SCHEMA:
                raise ValueError(f"schema {values['schema']!r}")
            tops = tuple({int(token): float(score) for token, score in top} for top in values["tops"])
            if len(tops) != PROMPTS or not all(tops) or not all(math.isfinite(x) for top in tops for x in top.values()):
                raise ValueError("tops")
            return cls(str(path), str(values["dtype"]), int(values["vocab_size"]), tops)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is no fingerprint of schema {SCHEMA} ({error}); {remedy}") from error

    def write(self, path: Path) -> None:
        """Raises OSError; leaves no half file."""
        tops = [[[token, score] for token, score in top.items()] for top in self.tops]
        values: dict[str, Any] = {
            "schema": SCHEMA,
            "source": self.source,
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "tops": tops,
        }
        write_atomically(path, (json.dumps(values) + "\n").encode())

    def difference(self, other: Fingerprint) -> str | None:
        """In words, in what the two are not of the same model; None if they may well be."""
        if self.vocab_size != other.vocab_size:
            return f"vocabularies of {self.vocab_size} and {other.vocab_size} ids"
        kept = min(TOP, self.vocab_size)
        both = [sorted(mine.keys() & theirs.keys()) for mine, theirs in zip(self.tops, other.tops, strict=True)]
        shared = sum(map(len, both))
        if shared < LEAST_SHARED * kept * PROMPTS:
            return f"only {shared} of the {kept * PROMPTS} likeliest ids after {PROMPTS} prompts are the same"
        pairs = zip(self.tops, other.tops, both, strict=True)
        distance = _distance([(_scores(mine, ids), _scores(theirs, ids)) for mine, theirs, ids in pairs])
        farthest = max(_farthest(self.dtype), _farthest(other.dtype))
        if not distance <= farthest:
            return f"scores of the likeliest ids differ by {distance:.2g}, more than {farthest:g} of their spread"
        return None


def prompts(vocab_size: int) -> list[tuple[int, ...]]:
    """The fixed prompts, of ids from the whole vocabulary; the same in every version and on every machine."""
    return [tuple(_number(f"{prompt}/{place}") % vocab_size for place in range(LENGTH)) for prompt in range(PROMPTS)]


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


async def _top_scores(engine: Engine, prompt: Sequence[int]) -> dict[int, float]:
    count = min(TOP, engine.info.vocab_size)
    if isinstance(engine, GivesTopScores):
        return await engine.top_scores(prompt, count)
    if isinstance(engine, GivesRows):
        row = (await engine.logits_at(prompt, (len(prompt) - 1,)))[0]
    else:
        row = (await engine.logits(prompt))[-1]
    best = np.argsort(-row, kind="stable")[:count]
    return {int(token): float(row[token]) for token in best}


def _scores(top: Mapping[int, float], ids: Sequence[int]) -> np.ndarray:
    """float64[K], without their mean: what is between logits and log-probabilities drops out."""
    scores = np.array([top[token] for token in ids], np.float64)
    return scores - scores.mean() if len(scores) else scores


def _distance(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Root of the summed squared differences, relative to the scores' own."""
    apart = sum(float(((mine - theirs) ** 2).sum()) for mine, theirs in pairs)
    spread = sum(float((mine**2).sum() + (theirs**2).sum()) / 2 for mine, theirs in pairs)
    return math.sqrt(apart / spread) if spread else 0.0 if not apart else math.inf


def _farthest(dtype: str) -> float:
    return FARTHEST.get(dtype, FARTHEST_QUANTISED)
