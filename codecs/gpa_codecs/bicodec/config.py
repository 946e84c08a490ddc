"""BiCodec's geometry, read from BiCodec/config.yaml."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gpa_codecs.codec import HOP_LENGTH, VOICE_CARDINALITY, VOICE_LENGTH
from gpa_codecs.config_file import ConfigFile
from gpa_codecs.errors import CheckpointError

DILATIONS = (1, 3, 9)
"""Of the three residual units after each upsampling of the wave generator (Kumar et al. 2023)."""


@dataclass(frozen=True, slots=True)
class MelConfig:
    """The speaker encoder's mel spectrogram; lengths in samples, frequencies in Hz."""

    sample_rate: int
    n_fft: int
    win_length: int
    hop_length: int
    mel_fmin: float
    mel_fmax: float
    num_mels: int


@dataclass(frozen=True, slots=True)
class VocosConfig:
    """A ConvNeXt backbone (Vocos, Siuzdak 2023) between two projections; sizes in channels.

    sampling_blocks: small backbones beside the main one, one for each entry of `sample_ratios`.
    condition_dim: channels of the vector that drives the adaptive layer norms; 0 for plain layer norms.
    """

    input_channels: int
    dim: int
    intermediate_dim: int
    num_layers: int
    out_channels: int
    sampling_blocks: int
    condition_dim: int = 0


@dataclass(frozen=True, slots=True)
class QuantizerConfig:
    """Factorised vector quantisation with an L2-normalised search (Yu et al. 2021)."""

    input_dim: int
    codebook_size: int
    codebook_dim: int


@dataclass(frozen=True, slots=True)
class SpeakerConfig:
    """ECAPA-TDNN, perceiver resampler and finite scalar quantisation."""

    input_dim: int
    out_dim: int
    latent_dim: int
    token_num: int
    fsq_levels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """The wave generator: channels halve at every upsampling by `rates`."""

    input_channel: int
    channels: int
    rates: tuple[int, ...]
    kernel_sizes: tuple[int, ...]

    @property
    def context(self) -> int:
        """Codes on each side of a sample that it may depend on: 11 as released.

        Counted from the last convolution to the first; every kernel but those of the upsampling has width seven.
        """
        reach = 3
        for rate, kernel_size in zip(reversed(self.rates), reversed(self.kernel_sizes), strict=True):
            padding = (kernel_size - rate) // 2
            reach += 3 * sum(DILATIONS)
            reach = -(-(reach + max(padding, kernel_size - 1 - padding)) // rate)
        return reach + 3


@dataclass(frozen=True, slots=True)
class BiCodecConfig:
    """All of BiCodec that is used at inference.

    ref_segment_length: samples of the reference clip that make a voice.
    """

    sample_rate: int
    hop_length: int
    ref_segment_length: int
    mel: MelConfig
    encoder: VocosConfig
    quantizer: QuantizerConfig
    speaker: SpeakerConfig
    prenet: VocosConfig
    generator: GeneratorConfig

    @property
    def codebook_size(self) -> int:
        """Number of semantic codes."""
        return self.quantizer.codebook_size

    @property
    def voice_length(self) -> int:
        """Global codes that make a voice."""
        return self.speaker.token_num

    @property
    def voice_cardinality(self) -> int:
        """Values that one global code can take."""
        return math.prod(self.speaker.fsq_levels)

    @classmethod
    def from_file(cls, path: str | Path) -> BiCodecConfig:
        """Read `config.yaml`; raises CheckpointError naming the file, the key and the value that does not fit."""
        file = ConfigFile.read(path)
        file.require("sample_rate", 16000)
        file.require("latent_hop_length", HOP_LENGTH)
        file.require("volume_normalize", True)
        parts = file.section("audio_tokenizer")
        # The reference clip is cut to whole latent frames, as Spark-TTS does.
        ref_frames = int(16000 * file.number("ref_segment_duration")) // HOP_LENGTH
        if not ref_frames:
            raise CheckpointError(
                f"{path}: ref_segment_duration is {file.values['ref_segment_duration']} s; expected at least 0.02 s"
            )
        config = cls(
            sample_rate=16000,
            hop_length=HOP_LENGTH,
            ref_segment_length=ref_frames * HOP_LENGTH,
            mel=_mel(parts.section("mel_params")),
            encoder=_vocos(parts.section("encoder")),
            quantizer=_quantizer(parts.section("quantizer")),
            speaker=_speaker(parts.section("speaker_encoder")),
            prenet=_vocos(parts.section("prenet"), conditioned=True),
            generator=_generator(parts.section("decoder")),
        )
        _check_widths(config, str(path))
        return config


def _mel(section: ConfigFile) -> MelConfig:
    section.require("sample_rate", 16000)
    mel = MelConfig(
        sample_rate=16000,
        n_fft=section.integer("n_fft"),
        win_length=section.integer("win_length"),
        hop_length=section.integer("hop_length"),
        mel_fmin=section.number("mel_fmin"),
        mel_fmax=section.number("mel_fmax", default=8000.0),
        num_mels=section.integer("num_mels"),
    )
    if mel.win_length > mel.n_fft:
        raise CheckpointError(f"{section.source}: win_length {mel.win_length} is larger than n_fft {mel.n_fft}")
    if not mel.mel_fmin < mel.mel_fmax <= mel.sample_rate / 2:
        raise CheckpointError(
            f"{section.source}: mel_fmin {mel.mel_fmin:g} and mel_fmax {mel.mel_fmax:g} Hz; "
            "expected a band within 0 to 8000"
        )
    return mel


def _vocos(section: ConfigFile, conditioned: bool = False) -> VocosConfig:
    ratios = section.integers("sample_ratios")
    section.require("sample_ratios", [1] * len(ratios))
    if conditioned:
        section.require("use_tanh_at_final", False)
    return VocosConfig(
        input_channels=section.integer("input_channels"),
        dim=section.integer("vocos_dim"),
        intermediate_dim=section.integer("vocos_intermediate_dim"),
        num_layers=section.integer("vocos_num_layers"),
        out_channels=section.integer("out_channels"),
        sampling_blocks=len(ratios),
        condition_dim=section.integer("condition_dim") if conditioned else 0,
    )


def _quantizer(section: ConfigFile) -> QuantizerConfig:
    # Spark-TTS misspells the key, and always normalises.
    section.require("use_l2_normlize", True, default=True)
    return QuantizerConfig(
        input_dim=section.integer("input_dim"),
        codebook_size=section.integer("codebook_size"),
        codebook_dim=section.integer("codebook_dim"),
    )


def _speaker(section: ConfigFile) -> SpeakerConfig:
    section.require("token_num", VOICE_LENGTH)
    section.require("fsq_num_quantizers", 1)
    levels = section.integers("fsq_levels")
    if math.prod(levels) != VOICE_CARDINALITY:
        raise CheckpointError(
            f"{section.source}: fsq_levels {list(levels)} make {math.prod(levels)} codes; expected {VOICE_CARDINALITY}"
        )
    return SpeakerConfig(
        input_dim=section.integer("input_dim"),
        out_dim=section.integer("out_dim"),
        latent_dim=section.integer("latent_dim"),
        token_num=VOICE_LENGTH,
        fsq_levels=levels,
    )


def _generator(section: ConfigFile) -> GeneratorConfig:
    generator = GeneratorConfig(
        input_channel=section.integer("input_channel"),
        channels=section.integer("channels"),
        rates=section.integers("rates"),
        kernel_sizes=section.integers("kernel_sizes"),
    )
    rates, kernels = generator.rates, generator.kernel_sizes
    if math.prod(rates) != HOP_LENGTH:
        raise CheckpointError(
            f"{section.source}: rates {list(rates)} make {math.prod(rates)} samples per code; expected {HOP_LENGTH}"
        )
    if len(kernels) != len(rates) or any(
        (kernel - rate) % 2 or kernel < rate for kernel, rate in zip(kernels, rates, strict=False)
    ):
        raise CheckpointError(
            f"{section.source}: kernel_sizes {list(kernels)} do not go with rates {list(rates)}; "
            "expected one for each rate, larger than it by an even number"
        )
    if generator.channels % 2 ** len(rates):
        raise CheckpointError(f"{section.source}: channels {generator.channels} cannot be halved {len(rates)} times")
    return generator


def _check_widths(config: BiCodecConfig, source: str) -> None:
    """The parts must fit together: each pair of widths that meet in the network must be equal."""
    latent, vector = config.quantizer.input_dim, config.speaker.out_dim
    pairs = (
        ("encoder.out_channels", config.encoder.out_channels, "quantizer.input_dim", latent),
        ("prenet.input_channels", config.prenet.input_channels, "quantizer.input_dim", latent),
        ("prenet.condition_dim", config.prenet.condition_dim, "speaker_encoder.out_dim", vector),
        ("prenet.out_channels", config.prenet.out_channels, "speaker_encoder.out_dim", vector),
        ("decoder.input_channel", config.generator.input_channel, "prenet.out_channels", config.prenet.out_channels),
        ("speaker_encoder.input_dim", config.speaker.input_dim, "mel_params.num_mels", config.mel.num_mels),
    )
    for left_name, left, right_name, right in pairs:
        if left != right:
            raise CheckpointError(f"{source}: {left_name} is {left}, but {right_name} is {right}; they must be equal")
