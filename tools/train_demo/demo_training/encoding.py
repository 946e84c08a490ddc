"""Codes of recordings by the networks that earlier stages trained, as the finished checkpoint will give them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from demo_training.dimensions import Geometry
from demo_training.recipe import Recipe
from demo_training.semantic import SemanticNetwork
from gpa_codecs.audio import normalize_volume
from gpa_codecs.features import log_mel_spectrogram, normalize_samples
from gpa_codecs.glm_tokenizer.model import GlmEncoder

Codes = NDArray[np.int64]
Float32 = NDArray[np.float32]

_BATCH = 16


def semantic_codes(recipe: Recipe, waves: Sequence[Float32]) -> list[Codes]:
    """Semantic codes of each wave float32[320 * T], T - 1 of them."""
    geometry = Geometry.read(recipe.layout)
    network = SemanticNetwork(geometry.bicodec, geometry.wav2vec2, phonemes=1)
    stored = recipe.load("semantic")
    network.wav2vec2.load_state_dict(_part(stored, "wav2vec2."))
    semantic = _part(stored, "bicodec.")
    network.semantic.load_state_dict({name: semantic[name] for name in network.semantic.state_dict()})
    network.to(recipe.device).eval()

    def run(rows: Sequence[int]) -> torch.Tensor:
        samples = [normalize_samples(normalize_volume(waves[row]).astype(np.float32)) for row in rows]
        return network.codes(torch.from_numpy(np.stack(samples)).to(recipe.device))

    return _by_length(waves, run)


def glm_codes(recipe: Recipe, waves: Sequence[Float32]) -> list[Codes]:
    """GLM codes of each wave float32[N], one for every 1280 samples begun."""
    geometry = Geometry.read(recipe.layout)
    encoder = GlmEncoder(geometry.glm)
    stored = recipe.load("glm")
    encoder.load_state_dict({name: stored[name] for name in encoder.state_dict()})
    encoder.to(recipe.device).eval()

    def run(rows: Sequence[int]) -> torch.Tensor:
        features = [log_mel_spectrogram(waves[row], geometry.glm_features) for row in rows]
        mels = torch.from_numpy(np.stack([mel for mel, _ in features]))
        return encoder(mels.to(recipe.device), features[0][1])

    return _by_length(waves, run)


def _by_length(waves: Sequence[Float32], run: Callable[[Sequence[int]], torch.Tensor]) -> list[Codes]:
    """Run batches of equal length: padding would change codes."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index, wave in enumerate(waves):
        groups[len(wave)].append(index)
    results: dict[int, Codes] = {}
    with torch.inference_mode():
        for rows in groups.values():
            for start in range(0, len(rows), _BATCH):
                batch = rows[start : start + _BATCH]
                results |= dict(zip(batch, run(batch).cpu().numpy(), strict=True))
    return [results[index] for index in range(len(waves))]


def _part(stored: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
