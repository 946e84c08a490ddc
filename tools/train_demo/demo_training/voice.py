"""Global codes: a frozen random ECAPA-TDNN, and a perceiver that learns to tell the voices from its frames.

Random features are enough for a handful of voices. Each of the frozen tensors holds two values only, so that the
architecture's fixed 512 channels cost next to nothing where the checkpoint is stored compressed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from demo_training.corpus import VOICES, Corpus
from demo_training.dimensions import Geometry
from demo_training.initialization import initialize
from demo_training.recipe import Recipe, Report, as_stored
from demo_training.training import Losses, Optimization, one_cycle, train
from gpa_codecs.audio import normalize_volume, reference_clip
from gpa_codecs.bicodec.config import BiCodecConfig
from gpa_codecs.bicodec.model import VoiceEncoder, WaveDecoder
from gpa_codecs.bicodec.quantizer import fsq_codes
from gpa_codecs.bicodec.speaker import EcapaTdnn, StoredBatchNorm
from gpa_codecs.features import mel_spectrogram

_STEPS = 250
_BATCH = 24
_CLIPS, _CHECKS = 40, 8  # reference clips of each voice: to learn from, and to report on
_NOISE = 0.003
_THINNED = 4
_CALIBRATION = 24  # clips that set the frozen network's batch norms
_JITTER = 0.1  # added before rounding, so that the codes of a voice lie in the middle of their steps


class VoiceNetwork(nn.Module):
    """Frame features of the frozen network -> codes -> the vector of a voice; and what training reads from it."""

    def __init__(self, bicodec: BiCodecConfig, decoder: WaveDecoder) -> None:
        super().__init__()
        self.encoder = VoiceEncoder(bicodec)
        self.project_out = decoder.speaker_encoder.quantizer.project_out
        self.project = decoder.speaker_encoder.project
        self.voice_head = nn.Linear(bicodec.speaker.out_dim, len(VOICES))
        self.pitch_head = nn.Linear(bicodec.speaker.out_dim, 1)
        initialize(self)

    def values(self, frames: Tensor) -> Tensor:
        """Frames (B, F, 1536) -> what is rounded to codes (B, 32, levels)."""
        speaker = self.encoder.speaker_encoder
        return speaker.quantizer.project_in(speaker.perceiver_sampler(frames))

    def vector(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values -> the voice's vector (B, out_dim) through rounding, and how far from their step the values were."""
        counts = torch.tensor(self.encoder.levels, dtype=values.dtype, device=values.device)
        half_range = (counts - 1) * (1 + 1e-3) / 2
        offset = torch.where(counts % 2 == 0, 0.5, 0.0)
        bounded = (values + torch.atanh(offset / half_range)).tanh() * half_range - offset
        steps = bounded + (bounded.round() - bounded).detach()
        latents = self.project_out(steps / (counts // 2))
        return self.project(latents.transpose(1, 2).flatten(1)), (bounded - bounded.detach().round()).square().mean()


def train_voice(recipe: Recipe, report: Report) -> None:
    """Stage `voice`: the speaker encoder, and a bank of each voice's codes."""
    geometry = Geometry.read(recipe.layout)
    corpus = Corpus.load(recipe.file("corpus.npz"))
    vectors = recipe.load("semantic")["voices"].to(recipe.device)
    recipe.seed_torch("voice")
    network = VoiceNetwork(geometry.bicodec, WaveDecoder(geometry.bicodec)).to(recipe.device)
    ecapa = network.encoder.speaker_encoder.speaker_encoder
    mels = _reference_mels(recipe, corpus, geometry.bicodec).to(recipe.device)
    clips = mels.shape[1] - _CHECKS
    _freeze(ecapa, recipe, mels[:, :clips].flatten(0, 1))
    with torch.inference_mode():
        # A clip at a time: all frames of all layers at once would not fit a small machine.
        frames = torch.stack([torch.cat([ecapa(clip[None]) for clip in voice]) for voice in mels]).transpose(2, 3)
    frames = frames.clone()
    f0 = torch.tensor([math.log2(voice.f0 / 160) for voice in VOICES], device=recipe.device)

    def losses(step: int, rng: np.random.Generator) -> Losses:
        voices = torch.from_numpy(rng.integers(len(VOICES), size=_BATCH)).to(recipe.device)
        chosen = torch.from_numpy(rng.integers(clips, size=_BATCH)).to(recipe.device)
        # A voice does not change within a clip: a quarter of its frames tells as much, in a quarter of the time.
        part = frames[voices, chosen, int(rng.integers(_THINNED)) :: _THINNED]
        values = network.values(part)
        jitter = torch.from_numpy(rng.normal(0.0, _JITTER, tuple(values.shape)).astype(np.float32))
        vector, spread = network.vector(values + jitter.to(recipe.device))
        found = {
            "vector": F.mse_loss(vector, vectors[voices]),
            "voice": F.cross_entropy(network.voice_head(vector), voices),
            "pitch": 3.0 * F.mse_loss(network.pitch_head(vector)[:, 0], f0[voices]),
            "spread": spread,
        }
        return {"loss": torch.stack(list(found.values())).sum(), **found}

    steps = recipe.steps(_STEPS)
    train(recipe, "voice", network, Optimization(steps, 2e-3, one_cycle), losses, report)
    as_stored(network)
    with torch.inference_mode():
        codes = torch.stack([fsq_codes(network.values(voice), network.encoder.levels) for voice in frames])
    report(steps, steps, _agreement(codes[:, clips:]))
    tensors = {f"bicodec.{name}": value for name, value in network.encoder.state_dict().items()}
    for name in ("project_out", "project"):
        prefix = "bicodec.speaker_encoder." + ("quantizer." if name == "project_out" else "")
        tensors |= {f"{prefix}{name}.{key}": value for key, value in getattr(network, name).state_dict().items()}
    recipe.save("voice", {**tensors, "codes": codes[:, :clips]})


def _reference_mels(recipe: Recipe, corpus: Corpus, config: BiCodecConfig) -> Tensor:
    """Spectrograms of reference clips as the codec makes them: float32 (voices, clips, mels, frames)."""
    rng = recipe.rng("voice", "clips")
    rows = []
    for voice in range(len(VOICES)):
        row = []
        for text in rng.integers(len(corpus.texts), size=max(4, round(_CLIPS * min(1, recipe.scale))) + _CHECKS):
            wave = corpus.wave(int(text) * corpus.voices + voice) * rng.uniform(0.3, 1.0)
            wave = normalize_volume(wave + rng.normal(0.0, rng.uniform(0.0, _NOISE), len(wave)))
            clip = reference_clip(wave.astype(np.float32), config.ref_segment_length)
            row.append(mel_spectrogram(clip.astype(np.float32), config.mel))
        rows.append(np.stack(row))
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def _freeze(ecapa: EcapaTdnn, recipe: Recipe, mels: Tensor) -> None:
    """Give every tensor two random values, and the batch norms the statistics of these spectrograms (B, mels, F)."""
    rng = recipe.rng("voice", "ecapa")
    for parameter in ecapa.parameters():
        parameter.requires_grad_(False)
        signs = torch.from_numpy(rng.integers(2, size=tuple(parameter.shape)) * 2.0 - 1.0)
        # Weights keep the level of what passes through them and a ReLU (He et al. 2015); biases are small.
        scale = math.sqrt(2 / math.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0.1
        parameter.copy_(signs * torch.tensor(scale).bfloat16())

    def calibrate(norm: StoredBatchNorm, inputs: tuple[Tensor, ...]) -> None:
        norm.weight.fill_(1.0)
        norm.running_mean.copy_(inputs[0].mean((0, 2)).bfloat16())
        norm.running_var.copy_(inputs[0].var((0, 2)).bfloat16())

    norms = [module for module in ecapa.modules() if isinstance(module, StoredBatchNorm)]
    hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    ecapa(mels[:: max(1, len(mels) // _CALIBRATION)])
    for hook in hooks:
        hook.remove()


def _agreement(codes: NDArray | Tensor) -> dict[str, float]:
    """Shares of equal codes among clips of one voice and of two. codes: (voices, clips, 32)."""
    equal = codes[:, :, None, None] == codes[None, None, :, :]  # (voice, clip, other voice, other clip, 32)
    shares = torch.as_tensor(equal).float().mean(-1)
    same = torch.stack([shares[voice, :, voice].mean() for voice in range(len(shares))]).mean()
    across = torch.stack(
        [shares[voice, :, other].mean() for voice in range(len(shares)) for other in range(voice)]
    ).mean()
    return {"same_voice": float(same), "across_voices": float(across)}
