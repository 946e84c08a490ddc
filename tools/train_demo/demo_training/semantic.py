"""Semantic codes: wav2vec 2.0 features, BiCodec's encoder and its codebook, learned together.

A code has to say which phoneme is spoken and how the spectrum looks once the voice is known: a head that exists only
during training predicts both. With few codes and phonemes as a target, a recording becomes long runs of equal codes,
which even a small language model predicts well.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo_training.corpus import VOICES, Corpus
from demo_training.dimensions import TRAINED_WAV2VEC2_LAYERS, Geometry
from demo_training.initialization import initialize
from demo_training.recipe import Recipe, Report, as_stored
from demo_training.spectra import log_mel
from demo_training.training import Losses, Optimization, one_cycle, train
from gpa_codecs.bicodec.config import BiCodecConfig
from gpa_codecs.bicodec.model import SemanticEncoder
from gpa_codecs.bicodec.quantizer import nearest_by_angle
from gpa_codecs.bicodec.vocos import FeatureDecoder
from gpa_codecs.codec import HOP_LENGTH
from gpa_codecs.wav2vec2.config import Wav2Vec2Config
from gpa_codecs.wav2vec2.model import Wav2Vec2Features

_STEPS = 1000
_BATCH = 12
_CROP = 50 * HOP_LENGTH  # samples; gives 49 frames
_FRAMES = _CROP // HOP_LENGTH - 1
_NOISE = 0.006
_MELS = 80
# Shares of the steps: until the first, latents pass unquantised; until the second, codes that nobody uses are moved.
_QUANTIZED_FROM, _RESEEDED_UNTIL = 0.15, 0.6
_RESEED_EVERY = 20
_COMMITMENT, _CODEBOOK = 0.25, 2.0


class SemanticNetwork(nn.Module):
    """The networks of the checkpoint under their names there, and the heads that only training uses."""

    usage: Tensor

    def __init__(self, bicodec: BiCodecConfig, wav2vec2: Wav2Vec2Config, phonemes: int) -> None:
        super().__init__()
        self.wav2vec2 = Wav2Vec2Features(wav2vec2)
        del self.wav2vec2.encoder.layers[TRAINED_WAV2VEC2_LAYERS:]
        self.semantic = SemanticEncoder(bicodec)
        quantizer = bicodec.quantizer
        self.out_project = nn.Conv1d(quantizer.codebook_dim, quantizer.input_dim, kernel_size=1)
        self.prenet = FeatureDecoder(bicodec.prenet)
        self.voices = nn.Embedding(len(VOICES), bicodec.speaker.out_dim)
        self.mel_head = nn.Linear(bicodec.prenet.out_channels, _MELS)
        self.feature_phonemes = nn.Linear(wav2vec2.hidden_size, phonemes)
        self.code_phonemes = nn.Linear(quantizer.input_dim, phonemes)
        self.register_buffer("usage", torch.zeros(quantizer.codebook_size))
        initialize(self)

    def features(self, samples: Tensor) -> Tensor:
        """Normalised samples (B, N) -> (B, T, hidden): what the whole stack gives, as its other layers add nothing."""
        hidden = self.wav2vec2.feature_projection(self.wav2vec2.feature_extractor(samples))
        hidden = hidden + self.wav2vec2.encoder.pos_conv_embed(hidden)
        for layer in self.wav2vec2.encoder.layers:
            hidden = layer(hidden)
        return hidden

    def latents(self, features: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, codebook_dim, T), before the codebook."""
        return self.semantic.quantizer.in_project(self.semantic.encoder(features.transpose(1, 2)))

    def codes(self, samples: Tensor) -> Tensor:
        """Normalised samples (B, N) -> int64 (B, T)."""
        return nearest_by_angle(self.latents(self.features(samples)), self.semantic.quantizer.codebook.weight)

    def quantized(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D, T) -> their codebook entries, through which the gradient passes, and the codebook's loss."""
        codebook = self.semantic.quantizer.codebook.weight
        codes = nearest_by_angle(latents.detach(), codebook)
        self.usage += torch.bincount(codes.flatten(), minlength=len(codebook))
        entries = codebook[codes].transpose(1, 2)
        loss = _COMMITMENT * F.mse_loss(latents, entries.detach()) + _CODEBOOK * F.mse_loss(entries, latents.detach())
        return latents + (entries - latents).detach(), loss

    @torch.no_grad()
    def fill_codebook(self, latents: Tensor, rng: np.random.Generator) -> None:
        """Take as many distinct latents as there are codes for the codebook."""
        vectors = latents.transpose(1, 2).flatten(0, 1)
        codebook = self.semantic.quantizer.codebook.weight
        codebook.copy_(vectors[torch.from_numpy(rng.permutation(len(vectors))[: len(codebook)])])

    @torch.no_grad()
    def move_unused_codes(self, latents: Tensor, rng: np.random.Generator) -> None:
        """Put codes that were not used since the last time onto random latents."""
        vectors = latents.transpose(1, 2).flatten(0, 1)
        unused = torch.nonzero(self.usage == 0)[:, 0]
        chosen = torch.from_numpy(rng.permutation(len(vectors))[: len(unused)])
        self.semantic.quantizer.codebook.weight[unused] = vectors[chosen]
        self.usage.zero_()


def train_semantic(recipe: Recipe, report: Report) -> None:
    """Stage `semantic`: wav2vec2, the encoder and its codebook, a prenet to start from, and a vector per voice."""
    geometry = Geometry.read(recipe.layout)
    corpus = Corpus.load(recipe.file("corpus.npz"))
    recipe.seed_torch("semantic")
    network = SemanticNetwork(geometry.bicodec, geometry.wav2vec2, len(corpus.phonemes)).to(recipe.device)
    steps = recipe.steps(_STEPS)
    quantized_from, reseeded_until = (round(share * steps) for share in (_QUANTIZED_FROM, _RESEEDED_UNTIL))

    def losses(step: int, rng: np.random.Generator) -> Losses:
        samples, clean, labels, voices = (array.to(recipe.device) for array in _batch(corpus, rng))
        features = network.features(samples)
        latents = network.latents(features)
        vq = torch.zeros((), device=recipe.device)
        if step == quantized_from:
            network.fill_codebook(latents, rng)
        elif quantized_from < step < reseeded_until and step % _RESEED_EVERY == 0:
            network.move_unused_codes(latents, rng)
        if step >= quantized_from:
            latents, vq = network.quantized(latents)
        coded = network.out_project(latents)
        vectors = network.voices(voices)
        mel = network.mel_head((network.prenet(coded, vectors) + vectors[:, :, None]).transpose(1, 2))
        found = {
            "mel": F.l1_loss(mel, log_mel(clean, _MELS, HOP_LENGTH)[:, :_FRAMES]),
            "feature_phonemes": _phoneme_loss(network.feature_phonemes(features), labels),
            "code_phonemes": _phoneme_loss(network.code_phonemes(coded.transpose(1, 2)), labels),
            "vq": vq,
        }
        total = found["mel"] + 0.5 * found["feature_phonemes"] + found["code_phonemes"] + vq
        right = (network.code_phonemes(coded.transpose(1, 2)).argmax(-1) == labels).float().mean()
        return {"loss": total, **found, "right": right}

    train(recipe, "semantic", network, Optimization(steps, 2e-3, one_cycle), losses, report)
    as_stored(network)
    tensors = {f"wav2vec2.{name}": value for name, value in network.wav2vec2.state_dict().items()}
    tensors |= {f"bicodec.{name}": value for name, value in network.semantic.state_dict().items()}
    tensors |= {f"bicodec.quantizer.out_project.{name}": v for name, v in network.out_project.state_dict().items()}
    tensors |= {f"bicodec.prenet.{name}": value for name, value in network.prenet.state_dict().items()}
    recipe.save("semantic", {**tensors, "voices": network.voices.weight})


def _batch(corpus: Corpus, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised noisy crops (B, N), the same ones clean, their labels (B, T) and voices (B)."""
    samples = np.zeros((_BATCH, _CROP), np.float32)
    clean = np.zeros((_BATCH, _CROP), np.float32)
    labels = np.full((_BATCH, _FRAMES), corpus.phonemes.index("_"))
    indices = rng.integers(len(corpus), size=_BATCH)
    for row, index in enumerate(indices):
        wave, names = corpus.wave(index), corpus.frame_labels(index)
        first = int(rng.integers(max(1, len(names) - _FRAMES)))
        crop = wave[first * HOP_LENGTH : first * HOP_LENGTH + _CROP]
        clean[row, : len(crop)] = crop
        known = names[first : first + _FRAMES]
        labels[row, : len(known)] = known
        noise = rng.normal(0.0, rng.uniform(0.0, _NOISE) / rng.uniform(0.3, 1.0), _CROP)
        # By the whole recording's level, as the codec does.
        samples[row] = (clean[row] + noise - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    voices = np.array([corpus.voice(index) for index in indices])
    return torch.from_numpy(samples), torch.from_numpy(clean), torch.from_numpy(labels), torch.from_numpy(voices)


def _phoneme_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
