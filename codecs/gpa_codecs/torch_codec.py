"""The speech codec in torch: BiCodec, wav2vec 2.0 and the GLM-4-Voice tokenizer, each part loaded when first needed."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpa_codecs.audio import SAMPLE_RATE, AudioSource, Waveform, load_audio, normalize_volume, reference_clip
from gpa_codecs.bicodec.config import BiCodecConfig
from gpa_codecs.bicodec.model import SemanticEncoder, VoiceEncoder, WaveDecoder
from gpa_codecs.codec import MINIMUM_LENGTH, AudioTokens, Codes, Family, Voice
from gpa_codecs.errors import AudioError, BackendError, CheckpointError, TokenError
from gpa_codecs.features import log_mel_spectrogram, mel_spectrogram, normalize_samples
from gpa_codecs.glm_tokenizer.config import GlmFeatureConfig, GlmTokenizerConfig
from gpa_codecs.glm_tokenizer.model import GlmEncoder
from gpa_codecs.wav2vec2.config import Wav2Vec2Config, check_preprocessor
from gpa_codecs.wav2vec2.model import Wav2Vec2Features
from gpa_codecs.weights import load_module

WAV2VEC2_FOLDER = "wav2vec2-large-xlsr-53"

FAMILIES: tuple[Family, ...] = ("semantic", "glm")

Float32 = NDArray[np.float32]
Module = TypeVar("Module", bound=nn.Module)


class TorchCodec:
    """A :class:`gpa_codecs.codec.SpeechCodec` in float32; safe to use from several threads.

    Only the parts that calls need are loaded: a voice needs no wav2vec 2.0, decoding needs no encoder. Every method
    with "batch" in its name gives what the method without gives for each clip. None is ever padded: on an accelerator
    clips of equal length run together, on a CPU, where that saves next to nothing, each runs alone and is bit-equal.
    """

    def __init__(
        self,
        bicodec_dir: str | Path,
        glm_dir: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Read BiCodec's configuration; the GLM tokenizer's, and all weights, follow on demand.

        bicodec_dir: the checkpoint's BiCodec folder, wav2vec2-large-xlsr-53 inside it. glm_dir: glm-4-voice-tokenizer.
        device: "cpu", "cuda", "cuda:N" or "mps"; on CUDA, TF32 convolutions are switched off for the whole process.
        threads: CPU threads of torch, one setting for the whole process too; None leaves it as it is.

        Raises CheckpointError for a folder that is not whole, and BackendError for a device that is not there.
        """
        self._device = _device(device)
        bicodec_dir, self._glm_dir = Path(bicodec_dir), Path(glm_dir)
        self._bicodec = BiCodecConfig.from_file(bicodec_dir / "config.yaml")
        if self._device.type == "cuda":
            # TF32 convolutions, cuDNN's default, keep 10 bits of the mantissa: enough to change tokens.
            torch.backends.cudnn.allow_tf32 = False
        if threads is not None:
            torch.set_num_threads(threads)

        def part(build: Callable[[], Module], folder: Path) -> _Part[Module]:
            return _Part(lambda: load_module(build, folder, self._device))

        self._features = _Part(lambda: self._load_wav2vec2(bicodec_dir / WAV2VEC2_FOLDER))
        self._semantic = part(lambda: SemanticEncoder(self._bicodec), bicodec_dir)
        self._voice = part(lambda: VoiceEncoder(self._bicodec), bicodec_dir)
        self._decoder = part(lambda: WaveDecoder(self._bicodec), bicodec_dir)
        self._glm_encoder = part(lambda: GlmEncoder(self._glm), self._glm_dir)

    @cached_property
    def _glm(self) -> GlmTokenizerConfig:
        return GlmTokenizerConfig.from_file(self._glm_dir / "config.json")

    @cached_property
    def _glm_features(self) -> GlmFeatureConfig:
        path = self._glm_dir / "preprocessor_config.json"
        features = GlmFeatureConfig.from_file(path)
        features.check(self._glm, str(path))
        return features

    @property
    def sample_rate(self) -> int:
        """16000 Hz."""
        return SAMPLE_RATE

    @property
    def semantic_cardinality(self) -> int:
        """Number of semantic codes."""
        return self._bicodec.codebook_size

    @property
    def glm_cardinality(self) -> int:
        """Number of GLM codes."""
        return self._glm.codebook_size

    @property
    def loaded_parts(self) -> tuple[str, ...]:
        """Which of wav2vec2, semantic, voice, decoder and glm have their weights in memory."""
        parts: dict[str, _Part] = {
            "wav2vec2": self._features,
            "semantic": self._semantic,
            "voice": self._voice,
            "decoder": self._decoder,
            "glm": self._glm_encoder,
        }
        return tuple(name for name, part in parts.items() if part.loaded)

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
        waves = [normalize_volume(_long_enough(load_audio(clip).pcm)).astype(np.float32) for clip in clips]
        references = [reference_clip(wave, self._bicodec.ref_segment_length) for wave in waves]

        def run(rows: Sequence[int]) -> NDArray:
            mels = np.stack([mel_spectrogram(references[row], self._bicodec.mel) for row in rows])
            return self._run(self._voice.get(), self._tensor(mels))

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
            codes = np.stack([semantic[row] for row in rows])
            return self._run(self._decoder.get(), self._tensor(codes), self._tensor(voices))

        return [Waveform(pcm, SAMPLE_RATE) for pcm in self._in_groups(semantic, run)]

    def _encode_semantic(self, waves: Sequence[NDArray[np.floating]]) -> list[Codes]:
        samples = [normalize_samples(normalize_volume(wave).astype(np.float32)) for wave in waves]

        def run(rows: Sequence[int]) -> NDArray:
            features, encoder = self._features.get(), self._semantic.get()
            return self._run(lambda batch: encoder(features(batch)), self._tensor(np.stack([samples[r] for r in rows])))

        return self._in_groups(samples, run)

    def _encode_glm(self, waves: Sequence[NDArray[np.floating]]) -> list[Codes]:
        limit = self._glm_features.block_length
        for wave in waves:
            if len(wave) > limit:
                raise AudioError(
                    f"audio of {len(wave)} samples ({len(wave) / SAMPLE_RATE:.1f} s) is longer than the {limit} "
                    f"({limit / SAMPLE_RATE:g} s) that the GLM tokenizer takes at once; "
                    "cut it with gpa_codecs.silences.cut_at_silences"
                )

        def run(rows: Sequence[int]) -> NDArray:
            features = [log_mel_spectrogram(waves[row].astype(np.float32), self._glm_features) for row in rows]
            frames = features[0][1]
            log_mel = self._tensor(np.stack([log_mel for log_mel, _ in features]))
            return self._run(lambda batch: self._glm_encoder.get()(batch, frames), log_mel)

        return self._in_groups(waves, run)

    def _load_wav2vec2(self, folder: Path) -> Wav2Vec2Features:
        config = Wav2Vec2Config.from_file(folder / "config.json")
        check_preprocessor(folder / "preprocessor_config.json")
        if config.hidden_size != self._bicodec.encoder.input_channels:
            raise CheckpointError(
                f"{folder / 'config.json'}: hidden_size is {config.hidden_size}, but BiCodec's encoder takes "
                f"{self._bicodec.encoder.input_channels} input_channels: this wav2vec2 does not belong to this BiCodec"
            )
        return load_module(lambda: Wav2Vec2Features(config), folder, self._device)

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
            groups[(len(item), index) if self._device.type == "cpu" else (len(item),)].append(index)
        results = {index: row for rows in groups.values() for index, row in zip(rows, run(rows), strict=True)}
        return [results[index] for index in range(len(items))]

    def _tensor(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _run(self, network: Callable[..., Tensor], *inputs: Tensor) -> NDArray:
        with torch.inference_mode():
            return network(*inputs).cpu().numpy()


class _Part(Generic[Module]):
    """A network that is loaded at the first use, once, whichever thread comes first."""

    def __init__(self, load: Callable[[], Module]) -> None:
        self._load = load
        self._lock = Lock()
        self._module: Module | None = None

    @property
    def loaded(self) -> bool:
        return self._module is not None

    def get(self) -> Module:
        with self._lock:
            if self._module is None:
                self._module = self._load()
            return self._module


def _long_enough(pcm: NDArray[np.floating]) -> NDArray[np.floating]:
    if len(pcm) < MINIMUM_LENGTH:
        raise AudioError(
            f"audio of {len(pcm)} samples ({1000 * len(pcm) / SAMPLE_RATE:g} ms at 16 kHz) is too short; "
            f"expected {MINIMUM_LENGTH} samples ({1000 * MINIMUM_LENGTH / SAMPLE_RATE:g} ms) or more"
        )
    return pcm


def _origin(clip: AudioSource) -> str:
    return Path(clip).name if isinstance(clip, str | os.PathLike) else ""


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackendError(f"device {name!r} is unknown; expected cpu, cuda, cuda:N or mps") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise BackendError(f"device {name!r} is not there; torch {torch.__version__} sees {count} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BackendError(f"device {name!r} is not there; torch {torch.__version__} sees no Apple GPU")
    return device
