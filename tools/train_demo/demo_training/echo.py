"""Codes of what the codec makes of codes: what the checkpoint has spoken is heard with other codes, a third of the
semantic ones.
"""

from __future__ import annotations

import numpy as np
import torch

from demo_training.corpus import VOICES
from demo_training.dimensions import Geometry
from demo_training.encoding import glm_codes, semantic_codes
from demo_training.recipe import Recipe, Report
from demo_training.tokens import TokenCorpus
from gpa_codecs.bicodec.model import WaveDecoder

_TEXTS = 1000
_PART = 25  # texts that are decoded and encoded at a time


def make_echo(recipe: Recipe, report: Report) -> None:
    """Stage `echo`: decode the codes of the first texts in their voices, and encode what is heard."""
    corpus = TokenCorpus.load(recipe.file("tokens.npz"))
    bank = recipe.load("voice")["codes"]
    decoder = WaveDecoder(Geometry.read(recipe.layout).bicodec)
    decoder.load_state_dict(recipe.load("generator", "bicodec."))
    decoder.eval()
    rng = recipe.rng("echo")
    texts = corpus.texts[: max(_PART, recipe.steps(_TEXTS))]
    semantic, glm = [], []
    for first in range(0, len(texts), _PART):
        report(first, len(texts), {})
        waves = []
        with torch.inference_mode():
            for row in range(first * len(VOICES), min(first + _PART, len(texts)) * len(VOICES)):
                globals_ = bank[row % len(VOICES), int(rng.integers(bank.shape[1]))]
                waves.append(decoder(torch.from_numpy(corpus.semantic[row])[None], globals_[None])[0].numpy())
        semantic += semantic_codes(recipe, waves)
        glm += glm_codes(recipe, waves)
    equal = [_agreement(corpus.semantic[row], codes) for row, codes in enumerate(semantic)]
    TokenCorpus(texts, semantic, glm).save(recipe.file("echo.npz"))
    report(len(texts), len(texts), {"semantic_agreement": float(np.mean(equal))})


def _agreement(before: np.ndarray, after: np.ndarray) -> float:
    length = min(len(before), len(after))
    return float(np.mean(before[:length] == after[:length]))
