"""The speech codec in torch: BiCodec, wav2vec 2.0 and the GLM-4-Voice tokenizer, each part loaded when first needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpa_codecs.bicodec.config import BiCodecConfig
from gpa_codecs.bicodec.model import SemanticEncoder, VoiceEncoder, WaveDecoder
from gpa_codecs.codec import Codes
from gpa_codecs.errors import BackendError, CheckpointError
from gpa_codecs.glm_tokenizer.config import GlmFeatureConfig, GlmTokenizerConfig
from gpa_codecs.glm_tokenizer.model import GlmEncoder
from gpa_codecs.network_codec import BiCodecSettings, Float32, GlmSettings, LazyPart, NetworkCodec
from gpa_codecs.wav2vec2.config import Wav2Vec2Config, check_preprocessor
from gpa_codecs.wav2vec2.model import Wav2Vec2Features
from gpa_codecs.weights import load_module

WAV2VEC2_FOLDER = "wav2vec2-large-xlsr-53"

Module = TypeVar("Module", bound=nn.Module)


class TorchCodec(NetworkCodec):
    """The codec of a checkpoint in the released layout, on any device of torch."""

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

        def part(build: Callable[[], Module], folder: Path) -> LazyPart[Module]:
            return LazyPart(lambda: load_module(build, folder, self._device))

        self._features = LazyPart(lambda: self._load_wav2vec2(bicodec_dir / WAV2VEC2_FOLDER))
        self._semantic = part(lambda: SemanticEncoder(self._bicodec), bicodec_dir)
        self._voice = part(lambda: VoiceEncoder(self._bicodec), bicodec_dir)
        self._decoder = part(lambda: WaveDecoder(self._bicodec), bicodec_dir)
        self._glm_encoder = part(lambda: GlmEncoder(self._glm), self._glm_dir)

    @cached_property
    def _glm(self) -> GlmTokenizerConfig:
        return GlmTokenizerConfig.from_file(self._glm_dir / "config.json")

    @cached_property
    def _bicodec_settings(self) -> BiCodecSettings:
        return BiCodecSettings(self._bicodec.codebook_size, self._bicodec.ref_segment_length, self._bicodec.mel)

    @cached_property
    def _glm_settings(self) -> GlmSettings:
        path = self._glm_dir / "preprocessor_config.json"
        features = GlmFeatureConfig.from_file(path)
        features.check(self._glm, str(path))
        return GlmSettings(self._glm.codebook_size, features)

    @property
    def glm_cardinality(self) -> int:
        """Number of GLM codes."""
        return self._glm.codebook_size

    @property
    def _shares_batches(self) -> bool:
        return self._device.type != "cpu"

    @property
    def _parts(self) -> dict[str, LazyPart]:
        return {
            "wav2vec2": self._features,
            "semantic": self._semantic,
            "voice": self._voice,
            "decoder": self._decoder,
            "glm": self._glm_encoder,
        }

    def _semantic_codes(self, samples: Float32) -> Codes:
        features, encoder = self._features.get(), self._semantic.get()
        return self._run(lambda batch: encoder(features(batch)), samples)

    def _voice_codes(self, mel: Float32) -> Codes:
        return self._run(self._voice.get(), mel)

    def _glm_codes(self, log_mel: Float32, frames: int) -> Codes:
        encoder = self._glm_encoder.get()
        return self._run(lambda batch: encoder(batch, frames), log_mel)

    def _decoded(self, semantic: Codes, voices: Codes) -> Float32:
        return self._run(self._decoder.get(), semantic, voices)

    def _load_wav2vec2(self, folder: Path) -> Wav2Vec2Features:
        config = Wav2Vec2Config.from_file(folder / "config.json")
        check_preprocessor(folder / "preprocessor_config.json")
        if config.hidden_size != self._bicodec.encoder.input_channels:
            raise CheckpointError(
                f"{folder / 'config.json'}: hidden_size is {config.hidden_size}, but BiCodec's encoder takes "
                f"{self._bicodec.encoder.input_channels} input_channels: this wav2vec2 does not belong to this BiCodec"
            )
        return load_module(lambda: Wav2Vec2Features(config), folder, self._device)

    def _run(self, network: Callable[..., Tensor], *inputs: NDArray) -> NDArray:
        with torch.inference_mode():
            return network(*(torch.from_numpy(array).to(self._device) for array in inputs)).cpu().numpy()


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
