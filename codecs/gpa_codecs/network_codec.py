"""The speech codec around its networks, whatever framework runs them. NumPy only.

Loading, loudness, features, lengths, checks and batches live here; :mod:`gpa_codecs.torch_codec` and
:mod:`gpa_codecs.onnx_codec` bring the networks.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.audio import SAMPLE_RATE, AudioSource, Waveform, load_audio, normalize_volume, reference_clip
from gpa_codecs.bicodec.config import MelConfig
from gpa_codecs.codec import MINIMUM_LENGTH, AudioTokens, Codes, Family, Voice
from gpa_codecs.errors import AudioError, TokenError
from gpa_codecs.features import log_mel_spectrogram, mel_spectrogram, normalize_samples
from gpa_codecs.glm_tokenizer.config import GlmFeatureConfig

FAMILIES: tuple[Family, ...] = ("semantic", "glm")

PARTS = ("wav2vec2", "semantic", "voice", "decoder", "glm")
"""The networks, each loaded without the others."""

Float32 = NDArray[np.float32]
Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True)
class BiCodecSettings:
    """What is needed around BiCodec's networks: codebook size, samples of the reference clip, its spectrogram."""

    codebook_size: int
    ref_segment_length: int
    mel: MelConfig


@dataclass(frozen=True, slots=True)
class GlmSettings:
    """What is needed around the GLM tokenizer's network: codebook size and log-mel spectrogram."""

    codebook_size: int
    features: GlmFeatureConfig


class NetworkCodec(ABC):
    """A :class:`gpa_codecs.codec.SpeechCodec` in float32; safe to use from several threads.

    Only the parts that calls need are loaded: a voice needs no wav2vec 2.0, decoding needs no encoder. Every method
    with "batch" in its name gives what the method without gives for each clip. None is ever padded: on an accelerator
    clips of equal length run together, on a CPU, where that saves next to nothing, each runs alone and is bit-equal.

    A subclass brings the settings and the networks, which take and give arrays with a batch axis B.
    """

    @property
    @abstractmethod
    def _bicodec_settings(self) -> BiCodecSettings: ...

    @property
    @abstractmethod
    def _glm_settings(self) -> GlmSettings:
        """Read when they are first needed: a checkpoint may lack the GLM tokenizer. Raises CheckpointError."""

    @property
    @abstractmethod
    def _shares_batches(self) -> bool:
        """Whether clips of equal length run together."""

    @property
    @abstractmethod
    def _parts(self) -> dict[str, LazyPart]:
        """One for each of `PARTS`, in that order."""

    @abstractmethod
    def _semantic_codes(self, samples: Float32) -> Codes:
        """Normalised samples float32[B, N] -> int64[B, T]."""

    @abstractmethod
    def _voice_codes(self, mel: Float32) -> Codes:
        """Mel spectrograms float32[B, num_mels, F] -> int64[B, 32]."""

    @abstractmethod
    def _glm_codes(self, log_mel: Float32, frames: int) -> Codes:
        """Log-mel spectrograms float32[B, feature_size, F], of which `frames` are audio -> int64[B, F // 8]."""

    @abstractmethod
    def _decoded(self, semantic: Codes, voices: Codes) -> Float32:
        """Semantic codes int64[B, T] and global codes int64[B, 32] -> float32[B, 320 * T]."""

    @property
    def sample_rate(self) -> int:
        """16000 Hz."""
        return SAMPLE_RATE

    @property
    def semantic_cardinality(self) -> int:
        """Number of semantic codes."""
        return self._bicodec_settings.codebook_size

    @property
    def glm_cardinality(self) -> int:
        """Number of GLM codes."""
        return self._glm_settings.codebook_size

    @property
    def loaded_parts(self) -> tuple[str, ...]:
        """Which of wav2vec2, semantic, voice, decoder and glm have their weights in memory."""
        return tuple(name for name, part in self._parts.items() if part.loaded)

    def encode(self, audio: AudioSource, families: Collection[Family] = FAMILIES) -> AudioTokens:
        """Codes of a clip: semantic int64[(N - 400) // 320 + 1] and glm int64[ceil(N / 1280)] for N samples at 16 kHz.

        A family that is not asked for is empty. Raises AudioError for fewer than 400 samples, and with "glm" for more
        than 30 s.
        """
        return self.encode_batch([audio], families)[0]

    def encode_batch(self, clips: Sequence[AudioSource], families: Collection[Family] = FAMILIES) -> list[AudioTokens]:
        """As :meth:`encode` for each clip."""
        unknown = set(families) - set(FAMILIES)
        if unknown:
            raise TokenError(f"token families {sorted(unknown)} are unknown; expected any of {list(FAMILIES)}")
        waves = [_long_enough(load_audio(clip).pcm) for clip in clips]
        nothing = [np.zeros(0, dtype=np.int64)] * len(waves)
        # The GLM tokenizer has a limit on the length: let it refuse before anything expensive runs.
        glm = self._encode_glm(waves) if "glm" in families else nothing
        semantic = self._encode_semantic(waves) if "semantic" in families else nothing
        return [
            AudioTokens(semantic=codes, glm=glm_codes, duration=len(wave) / SAMPLE_RATE)
            for wave, codes, glm_codes in zip(waves, semantic, glm, strict=True)
        ]

    def voice(self, audio: AudioSource) -> Voice:
        """The voice of a reference clip: its first 6 s, repeated when shorter. Raises AudioError as :meth:`encode`."""
        return self.voice_batch([audio])[0]

    def voice_batch(self, clips: Sequence[AudioSource]) -> list[Voice]:
        """As :meth:`voice` for each clip."""
        settings = self._bicodec_settings
        waves = [normalize_volume(_long_enough(load_audio(clip).pcm)).astype(np.float32) for clip in clips]
        references = [reference_clip(wave, settings.ref_segment_length) for wave in waves]

        def run(rows: Sequence[int]) -> NDArray:
            return self._voice_codes(np.stack([mel_spectrogram(references[row], settings.mel) for row in rows]))

        codes = self._in_groups(references, run)
        return [Voice(tuple(row.tolist()), _origin(clip)) for row, clip in zip(codes, clips, strict=True)]

    def decode(self, semantic: Codes, voice: Voice) -> Waveform:
        """Audio of semantic codes int64[T] in a voice: float32[320 * T] in [-1, 1], as the generator gives it.

        The mean is not removed (see :func:`gpa_codecs.audio.remove_dc`). Raises TokenError for no codes, or for codes
        outside the codebook.
        """
        return self.decode_batch([(semantic, voice)])[0]

    def decode_batch(self, pieces: Sequence[tuple[Codes, Voice]]) -> list[Waveform]:
        """As :meth:`decode` for each pair."""
        semantic = [self._check_semantic(codes) for codes, _ in pieces]

        def run(rows: Sequence[int]) -> NDArray:
            voices = np.array([pieces[row][1].codes for row in rows], dtype=np.int64)
            return self._decoded(np.stack([semantic[row] for row in rows]), voices)

        return [Waveform(pcm, SAMPLE_RATE) for pcm in self._in_groups(semantic, run)]

    def _encode_semantic(self, waves: Sequence[NDArray[np.floating]]) -> list[Codes]:
        samples = [normalize_samples(normalize_volume(wave).astype(np.float32)) for wave in waves]
        return self._in_groups(samples, lambda rows: self._semantic_codes(np.stack([samples[row] for row in rows])))

    def _encode_glm(self, waves: Sequence[NDArray[np.floating]]) -> list[Codes]:
        settings = self._glm_settings.features
        limit = settings.block_length
        for wave in waves:
            if len(wave) > limit:
                raise AudioError(
                    f"audio of {len(wave)} samples ({len(wave) / SAMPLE_RATE:.1f} s) is longer than the {limit} "
                    f"({limit / SAMPLE_RATE:g} s) that the GLM tokenizer takes at once; "
                    "cut it with gpa_codecs.silences.cut_at_silences"
                )

        def run(rows: Sequence[int]) -> NDArray:
            features = [log_mel_spectrogram(waves[row].astype(np.float32), settings) for row in rows]
            return self._glm_codes(np.stack([log_mel for log_mel, _ in features]), features[0][1])

        return self._in_groups(waves, run)

    def _check_semantic(self, semantic: Codes) -> Codes:
        codes = np.asarray(semantic)
        if codes.ndim != 1 or (codes.size and codes.dtype.kind not in "iu"):
            raise TokenError(f"semantic codes are {codes.dtype}{list(codes.shape)}; expected a list of integers")
        if not codes.size:
            raise TokenError("there are no speech tokens to decode")
        outside = np.flatnonzero((codes < 0) | (codes >= self.semantic_cardinality))
        if outside.size:
            raise TokenError(
                f"semantic code {outside[0]} is {codes[outside[0]]}; expected 0 to {self.semantic_cardinality - 1}"
            )
        return codes.astype(np.int64)

    def _in_groups(self, items: Sequence[NDArray], run: Callable[[Sequence[int]], NDArray]) -> list[NDArray]:
        """A result per item; run: indices of items that may share a batch -> their results, stacked along axis 0."""
        groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            groups[(len(item),) if self._shares_batches else (len(item), index)].append(index)
        results = {index: row for rows in groups.values() for index, row in zip(rows, run(rows), strict=True)}
        return [results[index] for index in range(len(items))]


class LazyPart(Generic[Loaded]):
    """A network that is loaded at the first use, once, whichever thread comes first."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load
        self._lock = Lock()
        self._network: Loaded | None = None

    @property
    def loaded(self) -> bool:
        return self._network is not None

    def get(self) -> Loaded:
        with self._lock:
            if self._network is None:
                self._network = self._load()
            return self._network


def _long_enough(pcm: NDArray[np.floating]) -> NDArray[np.floating]:
    if len(pcm) < MINIMUM_LENGTH:
        raise AudioError(
            f"audio of {len(pcm)} samples ({1000 * len(pcm) / SAMPLE_RATE:g} ms at 16 kHz) is too short; "
            f"expected {MINIMUM_LENGTH} samples ({1000 * MINIMUM_LENGTH / SAMPLE_RATE:g} ms) or more"
        )
    return pcm


def _origin(clip: AudioSource) -> str:
    return Path(clip).name if isinstance(clip, str | os.PathLike) else ""
