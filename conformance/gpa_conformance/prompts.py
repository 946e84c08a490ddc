"""A case's prompt, built for one checkpoint: text is encoded, clips become that checkpoint's own codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.codec import AudioTokens, Voice
from gpa_codecs.prompts import stt_prompt, task_tokens, tts_prompt, vc_prompt
from gpa_codecs.vocabulary import TokenSpace
from gpa_conformance.cases import Case


@dataclass(frozen=True, slots=True)
class ClipCodes:
    """What a codec makes of one clip. tokens: semantic and GLM codes. voice: its global codes."""

    tokens: AudioTokens
    voice: Voice


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids for an engine. stop_ids, allowed: as in GenerationRequest. task: "text", "stt", "tts-a" or "vc"."""

    ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    allowed: tuple[range, ...] | None
    task: str

    def candidates(self) -> NDArray[np.int64] | None:
        """int64[R], ascending: the ids that an answer can hold, stop ids included; None for the whole vocabulary."""
        if self.allowed is None:
            return None
        return np.unique(
            np.concatenate([np.asarray(self.stop_ids, np.int64), *(np.arange(r.start, r.stop) for r in self.allowed)])
        )


def build_prompt(
    prompt: Mapping[str, Any],
    space: TokenSpace,
    clip: Callable[[str], ClipCodes],
    cases: Sequence[Case] = (),
) -> Prompt:
    """The ids of a prompt as `gpa_conformance.cases` describes it. clip: the codes of a clip by its name."""
    match prompt:
        case {"case": name}:
            described = next(case.prompt for case in cases if case.id == name)
            if described is None:
                raise ValueError(f"case {name} has no prompt of its own")
            return build_prompt(described, space, clip, cases)
        case {"task": "stt", "clip": name}:
            return _task("stt", stt_prompt(space, clip(name).tokens), space)
        case {"task": "tts-a", "text": text, "voice": name}:
            return _task("tts-a", tts_prompt(space, text, clip(name).voice), space)
        case {"task": "vc", "clip": name, "voice": voice}:
            return _task("vc", vc_prompt(space, clip(name).tokens.semantic, clip(voice).voice), space)
        case {"text": text}:
            return _free(space.encode_text(text), space)
        case {"pattern": "spread", "length": length, "seed": seed}:
            return _free(spread_ids(length, seed, space.vocab_size), space)
        case _:
            raise ValueError(f"prompt {dict(prompt)!r} is none of those that gpa_conformance.cases describes")


def spread_ids(length: int, seed: int, vocab_size: int) -> list[int]:
    """`length` ids over the whole vocabulary, the same on every machine: a Weyl sequence (n times the golden ratio)."""
    golden = 0x9E3779B97F4A7C15
    return [((n * golden + seed * 0xD1B54A32D192ED03) % 2**64) * vocab_size >> 64 for n in range(1, length + 1)]


def _task(task: Any, ids: Sequence[int], space: TokenSpace) -> Prompt:
    stop_ids, allowed = task_tokens(space, task)
    return Prompt(tuple(ids), tuple(stop_ids), tuple(allowed), task)


def _free(ids: Sequence[int], space: TokenSpace) -> Prompt:
    return Prompt(tuple(ids), (space.control.im_end,), None, "text")
