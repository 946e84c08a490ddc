"""The language model's geometry, read from config.json as transformers 4 or 5 wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpa_codecs.config_file import ConfigFile
from gpa_codecs.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class LMConfig:
    """A dense Qwen3 decoder (Qwen3 technical report, 2025); sizes in elements, context in positions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str

    @classmethod
    def from_file(cls, path: str | Path) -> LMConfig:
        """Read `config.json`; raises CheckpointError for a missing key or an architecture that is not plain Qwen3."""
        config = ConfigFile.read(path)
        return cls.from_dict(config.values, config.source)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json") -> LMConfig:
        """As :meth:`from_file`, from a parsed config; `source` names it in errors."""
        if values.get("model_type") != "qwen3":
            raise CheckpointError(f"{source}: model_type is {values.get('model_type')!r}; GPA is a 'qwen3' model")
        if values.get("attention_bias"):
            raise CheckpointError(f"{source}: attention_bias is true; GPA's Qwen3 has no attention biases")
        if values.get("use_sliding_window"):
            raise CheckpointError(f"{source}: use_sliding_window is true; only full attention is supported")
        if other := set(values.get("layer_types") or ()) - {"full_attention"}:
            raise CheckpointError(
                f"{source}: layer_types has {min(map(str, other))!r}; only full attention is supported"
            )
        if values.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{source}: hidden_act is {values['hidden_act']!r}; expected 'silu'")
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        )
        config = ConfigFile(source, values)
        geometry = {name: config.integer(name) for name in sizes}
        heads, groups = geometry["num_attention_heads"], geometry["num_key_value_heads"]
        if heads % groups:
            raise CheckpointError(
                f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
            )
        derived = geometry["hidden_size"] // heads
        head_dim = derived if values.get("head_dim") is None else config.integer("head_dim")
        return cls(
            **geometry,
            head_dim=head_dim,
            rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            rope_theta=_rope_theta(values, source),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"),
        )


def _rope_theta(values: dict[str, Any], source: str) -> float:
    """transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one `rope_parameters`."""
    parameters = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise CheckpointError(f"{source}: rope type is {kind!r}; only plain rotary embeddings are supported")
    top, nested = values.get("rope_theta"), parameters.get("rope_theta")
    if top is not None and nested is not None and float(top) != float(nested):
        raise CheckpointError(f"{source}: rope_theta is {top} but rope_parameters.rope_theta is {nested}")
    theta = top if top is not None else nested
    if theta is None:
        raise CheckpointError(f"{source}: neither rope_theta nor rope_parameters.rope_theta is given")
    return float(theta)
