"""GLM codes: a Whisper encoder with its codebook, learned from the four phonemes that a code covers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo_training.corpus import Corpus
from demo_training.dimensions import Geometry
from demo_training.initialization import initialize
from demo_training.recipe import Recipe, Report, as_stored
from demo_training.training import Losses, Optimization, one_cycle, train
from gpa_codecs.codec import HOP_LENGTH
from gpa_codecs.features import log_mel_spectrogram
from gpa_codecs.glm_tokenizer.config import CONV_STRIDE, SAMPLES_PER_CODE, GlmTokenizerConfig
from gpa_codecs.glm_tokenizer.model import GlmEncoder

_STEPS = 900
_BATCH = 16
_NOISE = 0.006
_FRAMES_PER_CODE = SAMPLES_PER_CODE // HOP_LENGTH  # phonemes that a code must tell
_QUANTIZED_FROM, _RESEEDED_UNTIL = 0.35, 0.75
_RESEED_EVERY = 20
_DECAY = 0.97  # of the codebook's moving averages, in steps
_COMMITMENT = 0.25


class GlmNetwork(nn.Module):
    """The checkpoint's encoder, its codebook's moving averages (van den Oord et al. 2017), and a head for training."""

    ema_count: Tensor
    ema_weight: Tensor
    positions: Tensor

    def __init__(self, config: GlmTokenizerConfig, phonemes: int) -> None:
        super().__init__()
        self.encoder = GlmEncoder(config)
        self.phonemes = phonemes
        self.head = nn.Sequential(
            nn.Conv1d(config.d_model, config.ffn_dim, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv1d(config.ffn_dim, _FRAMES_PER_CODE * phonemes, kernel_size=1),
        )
        initialize(self)
        # The codebook follows the data by its averages, not by a gradient; positions are Whisper's fixed sinusoids.
        self.encoder.codebook.weight.requires_grad_(False)
        self.encoder.embed_positions.weight.requires_grad_(False).copy_(
            _sinusoids(config.max_source_positions, config.d_model)
        )
        self.register_buffer("ema_count", torch.zeros(config.codebook_size))
        self.register_buffer("ema_weight", torch.zeros(config.codebook_size, config.d_model))

    def vectors(self, mel: Tensor) -> Tensor:
        """Log-mel spectrogram (B, mels, F) -> the vectors before the codebook (B, F // 8, d_model)."""
        encoder = self.encoder
        hidden = F.gelu(encoder.conv1(F.pad(mel, (2, 0))))
        hidden = F.gelu(encoder.conv2(F.pad(hidden, (2, 0)))).transpose(1, 2)
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
        length = hidden.shape[1]
        blocks = torch.arange(length, device=mel.device) // encoder.block_size
        visible = blocks[:, None] >= blocks[None, :]
        for layer in encoder.layers:
            hidden = layer(hidden, visible)
        return F.avg_pool1d(hidden.transpose(1, 2), encoder.pooling).transpose(1, 2)

    def logits(self, vectors: Tensor) -> Tensor:
        """(B, T, d_model) -> (B, T, 4, phonemes)."""
        return self.head(vectors.transpose(1, 2)).transpose(1, 2).unflatten(-1, (_FRAMES_PER_CODE, self.phonemes))

    def quantized(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors -> their codebook entries, through which the gradient passes, and the commitment loss."""
        codebook = self.encoder.codebook.weight
        flat = vectors.detach().flatten(0, 1)
        codes = torch.cdist(flat, codebook).argmin(1)
        with torch.no_grad():
            chosen = F.one_hot(codes, len(codebook)).float()
            self.ema_count.mul_(_DECAY).add_(chosen.sum(0), alpha=1 - _DECAY)
            self.ema_weight.mul_(_DECAY).add_(chosen.T @ flat, alpha=1 - _DECAY)
        entries = codebook[codes].view_as(vectors)
        self.follow()
        return vectors + (entries - vectors).detach(), _COMMITMENT * F.mse_loss(vectors, entries)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the codebook to its averages."""
        used = self.ema_count > 1e-3
        self.encoder.codebook.weight[used] = self.ema_weight[used] / self.ema_count[used, None]

    @torch.no_grad()
    def place(self, codes: Tensor, vectors: Tensor, rng: np.random.Generator) -> None:
        """Put these codes onto random vectors, each counting as one use."""
        flat = vectors.detach().flatten(0, 1)
        chosen = flat[torch.from_numpy(rng.permutation(len(flat))[: len(codes)])]
        codes = codes[: len(chosen)]
        self.ema_count[codes] = 1.0
        self.ema_weight[codes] = chosen
        self.follow()

    def rarely_used(self) -> Tensor:
        """Indices of the codes that a batch uses less than once in ten."""
        return torch.nonzero(self.ema_count < 0.1)[:, 0]


def train_glm(recipe: Recipe, report: Report) -> None:
    """Stage `glm`: the GLM tokenizer."""
    geometry = Geometry.read(recipe.layout)
    corpus = Corpus.load(recipe.file("corpus.npz"))
    recipe.seed_torch("glm")
    with torch.no_grad():
        network = GlmNetwork(geometry.glm, len(corpus.phonemes)).to(recipe.device)
    steps = recipe.steps(_STEPS)
    quantized_from, reseeded_until = (round(share * steps) for share in (_QUANTIZED_FROM, _RESEEDED_UNTIL))
    order = np.argsort(corpus.lengths, kind="stable")

    def losses(step: int, rng: np.random.Generator) -> Losses:
        mel, labels = (array.to(recipe.device) for array in _batch(corpus, geometry, order, rng))
        vectors = network.vectors(mel)
        vq = torch.zeros((), device=recipe.device)
        if step == quantized_from:
            network.place(torch.arange(len(network.ema_count)), vectors, rng)
        elif quantized_from < step < reseeded_until and step % _RESEED_EVERY == 0:
            network.place(network.rarely_used(), vectors, rng)
        coded = vectors
        if step >= quantized_from:
            coded, vq = network.quantized(vectors)
        logits = network.logits(coded)
        phonemes = F.cross_entropy(logits.flatten(0, 2), labels.flatten())
        direct = F.cross_entropy(network.logits(vectors).flatten(0, 2), labels.flatten())
        right = (logits.argmax(-1) == labels).float().mean()
        return {"loss": phonemes + 0.3 * direct + vq, "phonemes": phonemes, "vq": vq, "right": right}

    train(recipe, "glm", network, Optimization(steps, 2e-3, one_cycle), losses, report)
    as_stored(network)
    averages = {"ema_count": network.ema_count, "ema_weight": network.ema_weight}
    recipe.save("glm", {**network.encoder.state_dict(), **averages})


def _batch(corpus: Corpus, geometry: Geometry, order: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Recordings of about the same length, cut to the shortest: log-mel (B, mels, F) and labels (B, F // 8, 4)."""
    start = int(rng.integers(len(order) - _BATCH + 1))
    indices = order[start : start + _BATCH]
    codes = int(corpus.lengths[indices[0]]) // SAMPLES_PER_CODE
    mels, labels = [], []
    for index in indices:
        wave = corpus.wave(index) * rng.uniform(0.3, 1.0)
        wave = wave + rng.normal(0.0, rng.uniform(0.0, _NOISE), len(wave)).astype(np.float32)
        mel, _ = log_mel_spectrogram(wave, geometry.glm_features)
        mels.append(mel[:, : codes * _FRAMES_PER_CODE * CONV_STRIDE])
        labels.append(corpus.frame_labels(index)[: codes * _FRAMES_PER_CODE].reshape(codes, _FRAMES_PER_CODE))
    return torch.from_numpy(np.stack(mels)), torch.from_numpy(np.stack(labels))


def _sinusoids(length: int, width: int) -> Tensor:
    """Whisper's position embeddings (Radford et al. 2022): sines, then cosines."""
    rates = torch.exp(-np.log(10_000.0) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates[None, :]
    return torch.cat((angles.sin(), angles.cos()), dim=1)
