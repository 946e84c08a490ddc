"""The demo checkpoint's text files: the released configuration with small dimensions, and the tokenizer.

Everything that is not a dimension is taken from the random checkpoints of the same layout.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gpa_codecs.bicodec.config import BiCodecConfig
from gpa_codecs.files import write_atomically
from gpa_codecs.glm_tokenizer.config import GlmFeatureConfig, GlmTokenizerConfig
from gpa_codecs.vocabulary import TokenSpace
from gpa_codecs.wav2vec2.config import Wav2Vec2Config
from gpa_engines.checkpoint.layout import Layout
from gpa_engines.lm_config import LMConfig
from gpa_engines.random_checkpoint import MARKER, configs
from gpa_engines.random_checkpoint.vocabulary import VocabularyLayout, control_id, tokenizer_files

TRAINED_WAV2VEC2_LAYERS = 3
"""The other layers add nothing, so that hidden states 11, 14 and 16 are all the output of the third."""

_GLM_CODES, _GLOBAL_CODES, _SEMANTIC_CODES = 128, 4096, 64
_TEXT, _CONTROL = 384, 48
_NAMED = _TEXT + _CONTROL + _GLM_CODES + _GLOBAL_CODES + _SEMANTIC_CODES

VOCABULARY = VocabularyLayout(
    base=_TEXT,
    glm=_TEXT + _CONTROL,
    glm_size=_GLM_CODES,
    global_size=_GLOBAL_CODES,
    semantic_size=_SEMANTIC_CODES,
    named=_NAMED,
)

# Rows of 256 and 512 values divide into the blocks of K-quants and the groups of MLX.
_LANGUAGE_MODEL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": _NAMED + 16,  # padded, as the released embedding may be
}
_WAV2VEC2 = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 17,
    "conv_dim": [16, 16, 24, 32, 48, 64, 64],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_codevectors_per_group": 16,
}
_GLM = {
    "d_model": 96,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 192,
    "encoder_layers": 3,
    "num_hidden_layers": 3,
    "num_mel_bins": 64,
    "pooling_position": 3,
    "quantize_position": 3,
    "quantize_vocab_size": _GLM_CODES,
}
_BACKBONE = {"vocos_dim": 64, "vocos_intermediate_dim": 128}
_LATENT = 64
_BICODEC: dict[str, dict[str, Any]] = {
    "mel_params": {"num_mels": 64},
    "encoder": {**_BACKBONE, "input_channels": 64, "vocos_num_layers": 2, "out_channels": _LATENT},
    "decoder": {"input_channel": _LATENT, "channels": 96},
    "quantizer": {"input_dim": _LATENT, "codebook_size": _SEMANTIC_CODES},
    "speaker_encoder": {"input_dim": 64, "out_dim": _LATENT, "latent_dim": 16},
    "prenet": {
        **_BACKBONE,
        "input_channels": _LATENT,
        "vocos_num_layers": 3,
        "out_channels": _LATENT,
        "condition_dim": _LATENT,
    },
    "postnet": {**_BACKBONE, "input_channels": _LATENT, "vocos_num_layers": 1, "out_channels": 64},
}


@dataclass(frozen=True, slots=True)
class Geometry:
    """The configurations as the product reads them."""

    lm: LMConfig
    space: TokenSpace
    bicodec: BiCodecConfig
    wav2vec2: Wav2Vec2Config
    glm: GlmTokenizerConfig
    glm_features: GlmFeatureConfig

    @classmethod
    def read(cls, folder: Path) -> Geometry:
        """Read a folder in the released layout. Raises CheckpointError."""
        layout = Layout.find(folder)
        return cls(
            lm=LMConfig.from_file(layout.root / "config.json"),
            space=TokenSpace.from_file(layout.tokenizer_file),
            bicodec=BiCodecConfig.from_file(layout.bicodec_dir / "config.yaml"),
            wav2vec2=Wav2Vec2Config.from_file(layout.wav2vec2_dir / "config.json"),
            glm=GlmTokenizerConfig.from_file(layout.glm_dir / "config.json"),
            glm_features=GlmFeatureConfig.from_file(layout.glm_dir / "preprocessor_config.json"),
        )


def language_model() -> dict[str, Any]:
    """config.json."""
    config = configs.language_model("tiny", 0) | _LANGUAGE_MODEL
    del config[MARKER]
    layers = config["num_hidden_layers"]
    config |= {"layer_types": ["full_attention"] * layers, "max_window_layers": layers}
    return config | {
        "bos_token_id": control_id(VOCABULARY, "<|endoftext|>"),
        "eos_token_id": control_id(VOCABULARY, "<|im_end|>"),
        "pad_token_id": control_id(VOCABULARY, "<|endoftext|>"),
    }


def bicodec() -> dict[str, Any]:
    """BiCodec/config.yaml."""
    config = configs.bicodec("tiny")
    parts = config["audio_tokenizer"]
    return {**config, "audio_tokenizer": {name: parts[name] | _BICODEC[name] for name in parts}}


def wav2vec2() -> dict[str, Any]:
    """BiCodec/wav2vec2-large-xlsr-53/config.json."""
    return configs.wav2vec2("tiny") | _WAV2VEC2


def glm_tokenizer() -> dict[str, Any]:
    """glm-4-voice-tokenizer/config.json."""
    return configs.glm_tokenizer("tiny") | _GLM


def write_text_files(folder: Path) -> None:
    """Write every file of the checkpoint but its weights and what is known only at the end. Raises OSError."""
    layout = Layout.find(_made(folder))
    generation = {key: language_model()[key] for key in ("eos_token_id", "pad_token_id")}
    texts = {
        layout.root / "config.json": _json(language_model()),
        layout.root / "generation_config.json": _json(generation),
        layout.bicodec_dir / "config.yaml": yaml.safe_dump(bicodec(), sort_keys=False),
        layout.wav2vec2_dir / "config.json": _json(wav2vec2()),
        layout.wav2vec2_dir / "preprocessor_config.json": _json(configs.wav2vec2_preprocessor()),
        layout.glm_dir / "config.json": _json(glm_tokenizer()),
        layout.glm_dir / "preprocessor_config.json": _json(
            configs.glm_preprocessor("tiny") | {"feature_size": _GLM["num_mel_bins"]}
        ),
    }
    texts |= {folder / name: text for name, text in tokenizer_files(VOCABULARY).items()}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())


def _made(folder: Path) -> Path:
    """The folder, there and not empty, as a layout must be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "chat_template.jinja", b"")
    return folder


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
