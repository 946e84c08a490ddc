"""The GLM-4-Voice tokenizer's geometry, read from config.json and preprocessor_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpa_codecs.config_file import ConfigFile
from gpa_codecs.errors import CheckpointError

SAMPLES_PER_CODE = 1280
"""Samples of 16 kHz audio per GLM code: 12.5 codes per second."""

CONV_STRIDE = 2
"""Mel frames per encoder position: the second convolution's stride."""


@dataclass(frozen=True, slots=True)
class GlmTokenizerConfig:
    """A Whisper encoder (Radford et al. 2022) with causal convolutions and block-causal attention, cut at the codebook.

    num_layers: layers before the codebook; later ones in a file are never needed.
    block_size: encoder positions that see each other in full; earlier blocks are seen too, later ones are not.
    """

    num_mel_bins: int
    d_model: int
    num_layers: int
    num_attention_heads: int
    ffn_dim: int
    max_source_positions: int
    pooling_kernel_size: int
    block_size: int
    codebook_size: int

    @classmethod
    def from_file(cls, path: str | Path) -> GlmTokenizerConfig:
        """Read `config.json`; raises CheckpointError naming the file, the key and the value that does not fit."""
        file = ConfigFile.read(path)
        file.require("activation_function", "gelu")
        file.require("encoder_causal_convolution", True)
        file.require("encoder_causal_attention", False)
        file.require("quantize_causal_encoder", False)
        file.require("pooling_type", "avg")
        num_layers = file.integer("quantize_position")
        file.require("pooling_position", num_layers)
        config = cls(
            num_mel_bins=file.integer("num_mel_bins"),
            d_model=file.integer("d_model"),
            num_layers=num_layers,
            num_attention_heads=file.integer("encoder_attention_heads"),
            ffn_dim=file.integer("encoder_ffn_dim"),
            max_source_positions=file.integer("max_source_positions"),
            pooling_kernel_size=file.integer("pooling_kernel_size"),
            block_size=file.integer("quantize_causal_block_size"),
            codebook_size=file.integer("quantize_vocab_size"),
        )
        if config.d_model % config.num_attention_heads:
            raise CheckpointError(
                f"{path}: d_model {config.d_model} is no multiple of "
                f"encoder_attention_heads {config.num_attention_heads}"
            )
        return config


@dataclass(frozen=True, slots=True)
class GlmFeatureConfig:
    """Whisper's log-mel spectrogram; lengths in samples of 16 kHz audio.

    block_length: samples of the longest clip that the encoder takes at once (30 s).
    """

    feature_size: int
    n_fft: int
    hop_length: int
    block_length: int

    @classmethod
    def from_file(cls, path: str | Path) -> GlmFeatureConfig:
        """Read `preprocessor_config.json`; raises CheckpointError as :meth:`GlmTokenizerConfig.from_file`."""
        file = ConfigFile.read(path)
        file.require("sampling_rate", 16000)
        file.require("padding_value", 0.0, default=0.0)
        file.require("dither", 0.0, default=0.0)
        return cls(
            feature_size=file.integer("feature_size"),
            n_fft=file.integer("n_fft"),
            hop_length=file.integer("hop_length"),
            block_length=file.integer("chunk_length") * 16000,
        )

    def check(self, model: GlmTokenizerConfig, source: str) -> None:
        """Refuse features that the model cannot take; `source` names preprocessor_config.json."""
        if self.feature_size != model.num_mel_bins:
            raise CheckpointError(
                f"{source}: feature_size is {self.feature_size}, but the model's num_mel_bins is {model.num_mel_bins}"
            )
        samples_per_code = self.hop_length * CONV_STRIDE * model.pooling_kernel_size
        if samples_per_code != SAMPLES_PER_CODE:
            raise CheckpointError(
                f"{source}: hop_length {self.hop_length} with pooling_kernel_size {model.pooling_kernel_size} "
                f"makes {samples_per_code} samples per code; expected {SAMPLES_PER_CODE}"
            )
        positions = self.block_length // (self.hop_length * CONV_STRIDE)
        if positions > model.max_source_positions:
            raise CheckpointError(
                f"{source}: chunk_length needs {positions} positions, "
                f"but the model's max_source_positions is {model.max_source_positions}"
            )
