"""The three parts of BiCodec that inference needs, each loadable without the others.

Module names are those of the released weight file, so that a part's state dict names exactly the tensors it reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpa_codecs.bicodec.config import BiCodecConfig, QuantizerConfig, SpeakerConfig
from gpa_codecs.bicodec.generator import WaveGenerator
from gpa_codecs.bicodec.quantizer import fsq_codes, fsq_values, nearest_by_angle
from gpa_codecs.bicodec.speaker import EcapaTdnn, PerceiverResampler
from gpa_codecs.bicodec.vocos import FeatureDecoder, FeatureEncoder


class SemanticEncoder(nn.Module):
    """wav2vec 2.0 features (B, T, input_channels) -> semantic codes int64 (B, T)."""

    def __init__(self, config: BiCodecConfig) -> None:
        super().__init__()
        self.encoder = FeatureEncoder(config.encoder)
        self.quantizer = _CodebookIn(config.quantizer)

    def forward(self, features: Tensor) -> Tensor:
        latents = self.quantizer.in_project(self.encoder(features.transpose(1, 2)))
        return nearest_by_angle(latents, self.quantizer.codebook.weight)


class VoiceEncoder(nn.Module):
    """Mel spectrogram (B, num_mels, F) -> global codes int64 (B, token_num)."""

    def __init__(self, config: BiCodecConfig) -> None:
        super().__init__()
        self.levels = config.speaker.fsq_levels
        self.speaker_encoder = _SpeakerIn(config.speaker)

    def forward(self, mel: Tensor) -> Tensor:
        speaker = self.speaker_encoder
        latents = speaker.perceiver_sampler(speaker.speaker_encoder(mel).transpose(1, 2))
        return fsq_codes(speaker.quantizer.project_in(latents), self.levels)


class WaveDecoder(nn.Module):
    """Semantic codes int64 (B, T) and global codes int64 (B, token_num) -> waveform (B, T * 320) in [-1, 1]."""

    def __init__(self, config: BiCodecConfig) -> None:
        super().__init__()
        self.levels = config.speaker.fsq_levels
        self.quantizer = _CodebookOut(config.quantizer)
        self.speaker_encoder = _SpeakerOut(config.speaker)
        self.prenet = FeatureDecoder(config.prenet)
        self.decoder = WaveGenerator(config.generator)

    def forward(self, semantic: Tensor, voice: Tensor) -> Tensor:
        return self.decoder(self.latents(semantic, voice)).squeeze(1)

    def latents(self, semantic: Tensor, voice: Tensor) -> Tensor:
        """The generator's input (B, input_channel, T): what is said and who says it, one frame for each code."""
        vector = self.speaker_vector(voice)
        codes = self.quantizer.out_project(self.quantizer.codebook(semantic).transpose(1, 2))
        return self.prenet(codes, vector) + vector.unsqueeze(-1)

    def speaker_vector(self, voice: Tensor) -> Tensor:
        """The d-vector (B, out_dim) of global codes: their latents, flattened channel by channel, projected."""
        latents = self.speaker_encoder.quantizer.project_out(fsq_values(voice, self.levels))
        return self.speaker_encoder.project(latents.transpose(1, 2).flatten(1))


class _CodebookIn(nn.Module):
    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.in_project = nn.Conv1d(config.input_dim, config.codebook_dim, kernel_size=1)
        self.codebook = nn.Embedding.from_pretrained(torch.empty(config.codebook_size, config.codebook_dim))


class _CodebookOut(nn.Module):
    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.codebook = nn.Embedding.from_pretrained(torch.empty(config.codebook_size, config.codebook_dim))
        self.out_project = nn.Conv1d(config.codebook_dim, config.input_dim, kernel_size=1)


class _SpeakerIn(nn.Module):
    def __init__(self, config: SpeakerConfig) -> None:
        super().__init__()
        self.speaker_encoder = EcapaTdnn(config.input_dim)
        self.perceiver_sampler = PerceiverResampler(config)
        self.quantizer = _ScalarsIn(config)


class _SpeakerOut(nn.Module):
    def __init__(self, config: SpeakerConfig) -> None:
        super().__init__()
        self.quantizer = _ScalarsOut(config)
        self.project = nn.Linear(config.latent_dim * config.token_num, config.out_dim)


class _ScalarsIn(nn.Module):
    def __init__(self, config: SpeakerConfig) -> None:
        super().__init__()
        self.project_in = nn.Linear(config.latent_dim, len(config.fsq_levels))


class _ScalarsOut(nn.Module):
    def __init__(self, config: SpeakerConfig) -> None:
        super().__init__()
        self.project_out = nn.Linear(len(config.fsq_levels), config.latent_dim)
