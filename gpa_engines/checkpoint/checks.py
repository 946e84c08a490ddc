"""The checks of each part: configurations against what is implemented, weight headers against configurations.

No tensor is read and no framework imported, so that all of them together take some milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gpa_codecs.bicodec.config import BiCodecConfig
from gpa_codecs.config_file import ConfigFile
from gpa_codecs.errors import CheckpointError
from gpa_codecs.glm_tokenizer.config import GlmFeatureConfig, GlmTokenizerConfig
from gpa_codecs.vocabulary import TokenSpace
from gpa_codecs.wav2vec2.config import Wav2Vec2Config, check_preprocessor
from gpa_codecs.weights import (
    PICKLE,
    PICKLE_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    TensorSpec,
    read_header,
    weight_files,
)
from gpa_engines.checkpoint.layout import Layout, Part, require_file
from gpa_engines.checkpoint.mlx_quantization import Quantization
from gpa_engines.lm_config import LMConfig

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to check: `file` is `what` of the part. `run` raises CheckpointError."""

    part: Part
    file: Path
    what: str
    run: Callable[[], object]


def checks(layout: Layout) -> list[Check]:
    """Every cheap check, part by part, each independent of what the others find.

    The token families are not among them: they take the whole tokenizer (see `check_sizes`).
    """

    def check(part: Part, path: Path, what: str, run: Callable[[Layout], object]) -> Check:
        return Check(part, path, what, lambda: run(layout))

    wav2vec2, glm = layout.wav2vec2_dir, layout.glm_dir
    return [
        check("lm", layout.root / "config.json", "configuration", lm_config),
        check("lm", _weight_file(layout.root), "weights", _check_lm_weights),
        check("tokenizer", layout.tokenizer_file, "vocabulary", _check_tokenizer),
        check("bicodec", layout.bicodec_dir / "config.yaml", "configuration", bicodec_config),
        check("bicodec", _weight_file(layout.bicodec_dir), "weights", _check_bicodec_weights),
        check("wav2vec2", wav2vec2 / "config.json", "configuration", _check_wav2vec2),
        check("wav2vec2", wav2vec2 / "preprocessor_config.json", "audio settings", _check_wav2vec2_preprocessor),
        check("wav2vec2", _weight_file(wav2vec2), "weights", _check_wav2vec2_weights),
        check("glm", glm / "config.json", "configuration", glm_config),
        check("glm", glm / "preprocessor_config.json", "audio settings", _check_glm_features),
        check("glm", _weight_file(glm), "weights", _check_glm_weights),
    ]


def check_sizes(
    space: TokenSpace,
    *,
    lm: LMConfig | None = None,
    bicodec: BiCodecConfig | None = None,
    glm: GlmTokenizerConfig | None = None,
) -> None:
    """Raise CheckpointError where a token family, or the highest id, does not fit the models that are given."""
    space.check(
        semantic_size=bicodec.codebook_size if bicodec else space.semantic.size,
        global_size=bicodec.voice_cardinality if bicodec else space.global_.size,
        glm_size=glm.codebook_size if glm else space.glm.size,
        vocab_size=lm.vocab_size if lm else space.vocab_size,
    )


def lm_config(layout: Layout) -> LMConfig:
    """The language model's configuration. Raises CheckpointError, as all below."""
    require_file("lm", layout.root / "config.json", "the language model's configuration")
    return LMConfig.from_file(layout.root / "config.json")


def bicodec_config(layout: Layout) -> BiCodecConfig:
    """BiCodec's configuration."""
    require_file("bicodec", layout.bicodec_dir / "config.yaml", "BiCodec's configuration")
    return BiCodecConfig.from_file(layout.bicodec_dir / "config.yaml")


def wav2vec2_config(layout: Layout) -> Wav2Vec2Config:
    """wav2vec2's configuration."""
    require_file("wav2vec2", layout.wav2vec2_dir / "config.json", "wav2vec2's configuration")
    return Wav2Vec2Config.from_file(layout.wav2vec2_dir / "config.json")


def glm_config(layout: Layout) -> GlmTokenizerConfig:
    """The GLM tokenizer's configuration."""
    require_file("glm", layout.glm_dir / "config.json", "the GLM tokenizer's configuration")
    return GlmTokenizerConfig.from_file(layout.glm_dir / "config.json")


def stored_tensors(folder: Path) -> dict[str, TensorSpec] | None:
    """Names, dtypes and shapes of all weights in a folder; None for `pytorch_model.bin`, which only torch can read."""
    files = weight_files(folder)
    if any(file.suffix != ".safetensors" for file in files):
        for file in files:
            if not file.stat().st_size:
                raise CheckpointError(f"{file} is empty; download it again")
        return None
    tensors: dict[str, TensorSpec] = {}
    for file in files:
        tensors |= read_header(file)
    return tensors


def optional(read: Callable[[Layout], Config], layout: Layout) -> Config | None:
    """A configuration, or None where it is missing or damaged (which is another check's finding)."""
    try:
        return read(layout)
    except CheckpointError:
        return None


def _weights(part: Part, layout: Layout) -> dict[str, TensorSpec] | None:
    require_file(part, _weight_file(layout.folder(part)), "weights (or model.safetensors.index.json with its shards)")
    return stored_tensors(layout.folder(part))


def _weight_file(folder: Path) -> Path:
    """The file that leads to a folder's weights, as `gpa_codecs.weights.weight_files` looks for it."""
    names = (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX)
    return next((folder / name for name in names if (folder / name).is_file()), folder / SAFETENSORS)


def _check_tokenizer(layout: Layout) -> None:
    require_file("tokenizer", layout.tokenizer_file, "the text tokenizer with the audio tokens")


def _check_lm_weights(layout: Layout) -> None:
    tensors = _weights("lm", layout)
    config = optional(lm_config, layout)
    if tensors is not None and config is not None:
        quantization = Quantization.from_config(ConfigFile.read(layout.root / "config.json"))
        check_lm_tensors(tensors, config, quantization, layout.root)


def check_lm_tensors(
    tensors: Mapping[str, TensorSpec], config: LMConfig, quantization: Quantization | None, folder: Path
) -> dict[str, str]:
    """Where each tensor of the language model is: its name of `lm_shapes` (and MLX's companions) -> its stored name.

    Raises CheckpointError for the first one that is missing or of another shape than the configuration says.
    """
    shapes = lm_shapes(config)
    prefix = key_prefix(tensors, next(iter(shapes)))
    if quantization is not None:
        shapes = quantization.shapes(shapes, {name.removeprefix(prefix) for name in tensors})
    _compare(tensors, shapes, folder)
    return {name: prefix + name for name in shapes}


def lm_shapes(config: LMConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the language model under transformers' names; a tied head is not stored."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    table = (config.vocab_size, hidden)
    shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    for number in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


def _check_bicodec_weights(layout: Layout) -> None:
    tensors = _weights("bicodec", layout)
    config = optional(bicodec_config, layout)
    if tensors is not None and config is not None:
        shape = (config.quantizer.codebook_size, config.quantizer.codebook_dim)
        _compare(tensors, {"quantizer.codebook.weight": shape}, layout.bicodec_dir)


def _check_wav2vec2(layout: Layout) -> None:
    config = wav2vec2_config(layout)
    codec = optional(bicodec_config, layout)
    if codec is not None and config.hidden_size != codec.encoder.input_channels:
        raise CheckpointError(
            f"{layout.wav2vec2_dir / 'config.json'}: hidden_size is {config.hidden_size}, but BiCodec's encoder takes "
            f"{codec.encoder.input_channels} input_channels: this wav2vec2 does not belong to this BiCodec"
        )


def _check_wav2vec2_preprocessor(layout: Layout) -> None:
    path = layout.wav2vec2_dir / "preprocessor_config.json"
    require_file("wav2vec2", path, "wav2vec2's audio settings")
    check_preprocessor(path)


def _check_wav2vec2_weights(layout: Layout) -> None:
    tensors = _weights("wav2vec2", layout)
    config = optional(wav2vec2_config, layout)
    if tensors is not None and config is not None:
        shape = (config.hidden_size, config.conv_dim[-1])
        _compare(tensors, {"feature_projection.projection.weight": shape}, layout.wav2vec2_dir)


def _check_glm_features(layout: Layout) -> None:
    path = layout.glm_dir / "preprocessor_config.json"
    require_file("glm", path, "the GLM tokenizer's audio settings")
    features = GlmFeatureConfig.from_file(path)
    config = optional(glm_config, layout)
    if config is not None:
        features.check(config, str(path))


def _check_glm_weights(layout: Layout) -> None:
    tensors = _weights("glm", layout)
    config = optional(glm_config, layout)
    if tensors is not None and config is not None:
        _compare(tensors, {"codebook.weight": (config.codebook_size, config.d_model)}, layout.glm_dir)


def _compare(tensors: Mapping[str, TensorSpec], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise CheckpointError for the first tensor that is missing or of another shape than the configuration says."""
    prefix = key_prefix(tensors, next(iter(expected)))
    files = ", ".join(file.name for file in weight_files(folder))
    for name, shape in expected.items():
        stored = tensors.get(prefix + name)
        if stored is None:
            raise CheckpointError(
                f"{folder}: {files} has no tensor {prefix + name}: the weights are incomplete, or do not belong to the "
                "configuration beside them"
            )
        if stored.shape != shape:
            raise CheckpointError(
                f"{folder}: {files}: {prefix + name} has shape {stored.shape}; expected {shape}, which the "
                "configuration beside it asks for"
            )


def key_prefix(names: Iterable[str], first: str) -> str:
    """What precedes `first` in the file (`model.`, `wav2vec2.`, nothing...): the shortest that occurs."""
    return min((name.removesuffix(first) for name in names if ("." + name).endswith("." + first)), key=len, default="")
