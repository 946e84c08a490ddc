"""What the language model learns from: the codes of many strings, each in every voice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demo_training.corpus import VOICES
from demo_training.digits import training_texts
from demo_training.encoding import Codes, glm_codes, semantic_codes
from demo_training.narration import narrate
from demo_training.recipe import Recipe, Report
from gpa_codecs.files import replacing

_TEXTS = 6_000
_PART = 250  # texts that are spoken, encoded and kept at a time


@dataclass(frozen=True, slots=True)
class TokenCorpus:
    """semantic, glm: the codes of text `i` in voice `v` at [i * voices + v]."""

    texts: list[str]
    semantic: list[Codes]
    glm: list[Codes]

    def save(self, path: Path) -> None:
        """Write everything to one .npz. Raises OSError."""
        semantic, glm = (np.concatenate(codes).astype(np.uint8) for codes in (self.semantic, self.glm))
        semantic_ends, glm_ends = (np.cumsum([len(row) for row in codes]) for codes in (self.semantic, self.glm))
        texts = np.array(json.dumps(self.texts))
        with replacing(path) as file:
            np.savez(file, texts=texts, semantic=semantic, semantic_ends=semantic_ends, glm=glm, glm_ends=glm_ends)

    @classmethod
    def load(cls, path: Path) -> TokenCorpus:
        """What `save` wrote."""
        with np.load(path) as stored:
            semantic, glm = (_rows(stored[name], stored[f"{name}_ends"]) for name in ("semantic", "glm"))
            return cls(json.loads(str(stored["texts"])), semantic, glm)


def make_tokens(recipe: Recipe, report: Report) -> None:
    """Stage `tokens`: speak and encode the language model's corpus, part by part."""
    texts = training_texts(recipe.steps(_TEXTS), recipe.rng("tokens"))
    parts = [texts[start : start + _PART] for start in range(0, len(texts), _PART)]
    files = [recipe.out / "work" / f"tokens-{number}.npz" for number in range(len(parts))]
    for number, (part, file) in enumerate(zip(parts, files, strict=True)):
        if not file.is_file():
            spoken = narrate(part)
            waves = [spoken.wave(index) for index in range(len(spoken))]
            TokenCorpus(part, semantic_codes(recipe, waves), glm_codes(recipe, waves)).save(file)
        report(number + 1, len(parts), {})
    done = [TokenCorpus.load(file) for file in files]
    whole = TokenCorpus(
        [text for part in done for text in part.texts],
        [codes for part in done for codes in part.semantic],
        [codes for part in done for codes in part.glm],
    )
    assert len(whole.semantic) == len(whole.texts) * len(VOICES)
    whole.save(recipe.file("tokens.npz"))


def _rows(flat: NDArray[np.uint8], ends: NDArray[np.int64]) -> list[Codes]:
    return np.split(flat.astype(np.int64), ends[:-1])
