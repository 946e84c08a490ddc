"""Qwen3 (Qwen3 technical report, 2025) as a function of ragged rows: exact to transformers' in float32.

The residual stream, the norms and the rotary embedding are float32 whatever the weights are; the linear layers and
attention run in the weight format's compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from gpa_engines.backends.mlx.attention import RowPlan
from gpa_engines.backends.mlx.linear import Linear, StoredWeight, WeightFormat, join
from gpa_engines.backends.mlx.weights import Tensors
from gpa_engines.lm_config import LMConfig


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Norm weights are float32; `head_norm` is [heads + kv_heads, D]: queries, then keys."""

    input_norm: mx.array
    qkv: Linear
    head_norm: mx.array
    output: Linear
    mlp_norm: mx.array
    gate_up: Linear
    down: Linear


class Qwen3:
    """The decoder without its head. positions: how many the rotary table holds."""

    def __init__(self, tensors: Tensors, config: LMConfig, weights: WeightFormat, positions: int) -> None:
        self.config = config
        self.format = weights
        # As stored, whatever the compute dtype: a lookup touches some rows, and the head builds what it needs.
        self.embedding = tensors.matrix("model.embed_tokens.weight")
        self.head_weight = self.embedding if config.tie_word_embeddings else tensors.matrix("lm_head.weight")
        self.layers = [_build_layer(tensors, index, config, weights) for index in range(config.num_hidden_layers)]
        self.final_norm = tensors.vector("model.norm.weight")
        self.rotation = _rotary_tables(config, positions)
        mx.eval(self.embedding.arrays, self.head_weight.arrays, self.final_norm, self.rotation)

    def forward(
        self, ids: mx.array, positions: mx.array, plan: RowPlan, after_layer: Callable[[mx.array], None]
    ) -> mx.array:
        """ids, positions: int32[M] -> float32[M, hidden], before the final norm.

        after_layer: is given every layer's result, which it may evaluate; what it raises ends the pass.
        MLX checks neither: an id or position beyond its table reads whatever is in memory there.
        """
        config, compute = self.config, self.format.compute
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rotated = heads + kv_heads
        hidden = self.format.values(self.embedding.take(ids))
        cosines, sines = (table[positions][:, None] for table in self.rotation)
        for index, layer in enumerate(self.layers):
            x = self.normalize(hidden, layer.input_norm)
            qkv = layer.qkv(x).reshape(-1, rotated + kv_heads, width)
            qk = mx.fast.rms_norm(qkv[:, :rotated].astype(mx.float32), None, config.rms_norm_eps) * layer.head_norm
            qk = rotate(qk, cosines, sines).astype(compute)
            x = plan.attend(index, qk[:, :heads], qk[:, heads:], qkv[:, rotated:])
            hidden = hidden + layer.output(x).astype(mx.float32)
            gate, up = mx.split(layer.gate_up(self.normalize(hidden, layer.mlp_norm)), 2, axis=1)
            hidden = hidden + layer.down(gate * mx.sigmoid(gate) * up).astype(mx.float32)
            after_layer(hidden)
        return hidden

    def normalize(self, hidden: mx.array, weight: mx.array) -> mx.array:
        """RMSNorm in float32 (Zhang & Sennrich 2019), then the compute dtype."""
        return mx.fast.rms_norm(hidden, weight, self.config.rms_norm_eps).astype(self.format.compute)


def rotate(x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """Rotary embedding (RoFormer, Su et al. 2021) of the pairs (i, i + D / 2).

    x: float32[M, heads, D]; cosines, sines: float32[M, 1, D]. MLX's own `rope` computes the angles anew in every call,
    and less exactly the later the position.
    """
    first, second = mx.split(x, 2, axis=-1)
    return x * cosines + mx.concatenate([second, first], axis=-1) * sines


def _rotary_tables(config: LMConfig, positions: int) -> tuple[mx.array, mx.array]:
    """Twice float32[positions, D]: cosines, and sines with the sign of the first half turned.

    The angles are transformers' float32 numbers; each function is rounded once.
    """
    exponents = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
    powers = np.power(config.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * (np.float32(1) / powers)
    cosines, sines = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    return (
        mx.array(np.concatenate((cosines, cosines), axis=1).astype(np.float32)),
        mx.array(np.concatenate((-sines, sines), axis=1).astype(np.float32)),
    )


def _build_layer(tensors: Tensors, index: int, config: LMConfig, weights: WeightFormat) -> Layer:
    def norm(name: str) -> mx.array:
        return tensors.vector(f"model.layers.{index}.{name}.weight")

    def linear(*names: str) -> Linear:
        parts: list[StoredWeight] = [tensors.matrix(f"model.layers.{index}.{name}.weight") for name in names]
        return weights.build(parts[0] if len(parts) == 1 else join(parts))

    width = config.head_dim
    query_norm = mx.broadcast_to(norm("self_attn.q_norm"), (config.num_attention_heads, width))
    key_norm = mx.broadcast_to(norm("self_attn.k_norm"), (config.num_key_value_heads, width))
    layer = Layer(
        input_norm=norm("input_layernorm"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_norm=mx.concatenate([query_norm, key_norm]),
        output=linear("self_attn.o_proj"),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )
    mx.eval(layer.input_norm, layer.head_norm, layer.mlp_norm)
    return layer
