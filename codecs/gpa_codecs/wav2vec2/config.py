"""wav2vec 2.0's geometry, read from config.json and checked against what BiCodec's features need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gpa_codecs.codec import HOP_LENGTH
from gpa_codecs.config_file import ConfigFile
from gpa_codecs.errors import CheckpointError

FEATURE_STATES = (11, 14, 16)
"""Hidden states whose mean is BiCodec's input; 0 is the input of the first transformer layer (Spark-TTS)."""


@dataclass(frozen=True, slots=True)
class Wav2Vec2Config:
    """A wav2vec 2.0 with layer norm in the feature extractor and before each sublayer ("stable layer norm")."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    conv_dim: tuple[int, ...]
    conv_kernel: tuple[int, ...]
    conv_stride: tuple[int, ...]
    conv_bias: bool
    num_conv_pos_embeddings: int
    num_conv_pos_embedding_groups: int

    @property
    def minimum_length(self) -> int:
        """Samples that give one feature frame; each further frame takes 320 more."""
        length = 1
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            length = (length - 1) * stride + kernel
        return length

    @classmethod
    def from_file(cls, path: str | Path) -> Wav2Vec2Config:
        """Read `config.json`; raises CheckpointError naming the file, the key and the value that does not fit."""
        file = ConfigFile.read(path)
        file.require("model_type", "wav2vec2")
        file.require("do_stable_layer_norm", True)
        file.require("feat_extract_norm", "layer")
        file.require("feat_extract_activation", "gelu", default="gelu")
        file.require("hidden_act", "gelu", default="gelu")
        file.require("add_adapter", False, default=False)
        file.require("adapter_attn_dim", None, default=None)
        config = cls(
            hidden_size=file.integer("hidden_size"),
            intermediate_size=file.integer("intermediate_size"),
            num_hidden_layers=file.integer("num_hidden_layers"),
            num_attention_heads=file.integer("num_attention_heads"),
            layer_norm_eps=file.number("layer_norm_eps", default=1e-5),
            conv_dim=file.integers("conv_dim"),
            conv_kernel=file.integers("conv_kernel"),
            conv_stride=file.integers("conv_stride"),
            conv_bias=file.flag("conv_bias"),
            num_conv_pos_embeddings=file.integer("num_conv_pos_embeddings"),
            num_conv_pos_embedding_groups=file.integer("num_conv_pos_embedding_groups"),
        )
        config._check(str(path))
        return config

    def _check(self, source: str) -> None:
        if self.num_hidden_layers < max(FEATURE_STATES):
            raise CheckpointError(
                f"{source}: num_hidden_layers is {self.num_hidden_layers}; "
                f"BiCodec's features need hidden state {max(FEATURE_STATES)}"
            )
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise CheckpointError(f"{source}: conv_dim, conv_kernel and conv_stride differ in length")
        if math.prod(self.conv_stride) != HOP_LENGTH:
            raise CheckpointError(
                f"{source}: conv_stride {list(self.conv_stride)} makes {math.prod(self.conv_stride)} samples "
                f"per frame; expected {HOP_LENGTH}"
            )
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise CheckpointError(
                    f"{source}: hidden_size {self.hidden_size} is no multiple of {name} {getattr(self, name)}"
                )


def check_preprocessor(path: str | Path) -> None:
    """Refuse a `preprocessor_config.json` that does not ask for 16 kHz audio of zero mean and unit variance."""
    file = ConfigFile.read(path)
    file.require("do_normalize", True)
    file.require("sampling_rate", 16000)
