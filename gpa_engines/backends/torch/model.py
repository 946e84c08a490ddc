"""Qwen3 (Qwen3 technical report, 2025) as a function of ragged rows: exact to transformers' in float32.

The residual stream, the norms and the rotary embedding are float32 whatever the weights are; the linear layers and
attention run in the weight format's compute dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gpa_codecs.weights import load_weights
from gpa_engines.backends.torch.attention import AttentionPlan
from gpa_engines.backends.torch.device import move
from gpa_engines.backends.torch.linear import Linear, WeightFormat
from gpa_engines.lm_config import LMConfig


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Norm weights are float32; `head_norm` is [heads + kv_heads, D]: queries, then keys."""

    input_norm: Tensor
    qkv: Linear
    head_norm: Tensor
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Qwen3:
    """The decoder without its head.

    Query and key rows are stored so that the two halves of a rotated pair are neighbours; scores do not change, and a
    rotation is one complex product. positions: how many the rotary table holds.
    """

    def __init__(self, folder: Path, config: LMConfig, weights: WeightFormat, positions: int) -> None:
        self.config = config
        self.format = weights
        self.embedding, self.head_weight = _load_tables(folder, config, weights)
        stored = load_weights(folder, _layer_shapes(config))
        self.final_norm = move(stored.pop("model.norm.weight"), weights.device, torch.float32)
        self.layers = [_build_layer(stored, index, config, weights) for index in range(config.num_hidden_layers)]
        self.rotation = _rotary_table(config, positions).to(weights.device)

    def forward(self, ids: Tensor, positions: Tensor, plan: AttentionPlan, *, wide: bool = False) -> Tensor:
        """ids, positions: int64[M] -> float32[M, hidden], before the final norm.

        wide: multiply by `Linear.wide`, which is meant for many rows of one request.
        """
        config, compute = self.config, self.format.compute
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rotated = heads + kv_heads
        rows = len(ids)
        hidden = F.embedding(ids, self.embedding).to(torch.float32)
        rotation = self.rotation[positions][:, None]
        for index, layer in enumerate(self.layers):
            x = self.normalize(hidden, layer.input_norm)
            qkv = _product(layer.qkv, x, wide).view(rows, rotated + kv_heads, width)
            qk = torch.rms_norm(qkv[:, :rotated].float(), (width,), None, config.rms_norm_eps).mul_(layer.head_norm)
            qk = rotate(qk, rotation).to(compute)
            x = plan.attend(index, qk[:, :heads], qk[:, heads:], qkv[:, rotated:])
            hidden.add_(_product(layer.output, x, wide))
            x = _product(layer.gate_up, self.normalize(hidden, layer.mlp_norm), wide)
            gate, up = x.split(config.intermediate_size, dim=1)
            hidden.add_(_product(layer.down, F.silu(gate).mul_(up), wide))
        return hidden

    def normalize(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in float32 (Zhang & Sennrich 2019), then the compute dtype."""
        return torch.rms_norm(hidden, weight.shape, weight, self.config.rms_norm_eps).to(self.format.compute)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding (RoFormer, Su et al. 2021) of neighbouring pairs, possibly in place.

    x: float32[M, heads, D]; rotation: float32[M, 1, D / 2, 2], cosines and sines.
    """
    if x.device.type == "cpu":
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(torch.view_as_complex(rotation))
        return x
    return turn_pairs(x, rotation)


def turn_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """:func:`rotate` for devices without complex numbers."""
    (real, imaginary), (cosine, sine) = x.unflatten(-1, (-1, 2)).unbind(-1), rotation.unbind(-1)
    turned = (real * cosine - imaginary * sine, imaginary * cosine + real * sine)
    return torch.stack(turned, dim=-1).flatten(-2)


def _product(linear: Linear, x: Tensor, wide: bool) -> Tensor:
    return linear.wide(x) if wide else linear(x)


def _rotary_table(config: LMConfig, positions: int) -> Tensor:
    """float32[positions, D / 2, 2]: cosine and sine, by transformers' arithmetic."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    angles = torch.arange(positions).float()[:, None] * (1.0 / config.rope_theta**exponents)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def _load_tables(folder: Path, config: LMConfig, weights: WeightFormat) -> tuple[Tensor, Tensor]:
    """The embedding table and the head's weight, [V, hidden]; the same tensor when they are tied.

    On a CPU both stay in the mapped file in its dtype: a lookup touches a row, and the head packs what it needs. They
    have a mapping of their own, so that the layers' part of the file leaves memory once they are built.
    """
    names = ["model.embed_tokens.weight"] + ([] if config.tie_word_embeddings else ["lm_head.weight"])
    tables = load_weights(folder, dict.fromkeys(names, (config.vocab_size, config.hidden_size)))
    if weights.device.type != "cpu":
        tables = {name: move(table, weights.device, weights.compute) for name, table in tables.items()}
    return tables[names[0]], tables[names[-1]]


def _layer_shapes(config: LMConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor below the tables, by transformers' names."""
    hidden, width = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    for index in range(config.num_hidden_layers):
        shapes |= {
            f"model.layers.{index}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.q_norm": (width,),
                "self_attn.k_norm": (width,),
                "self_attn.o_proj": (hidden, queries),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (config.intermediate_size, hidden),
                "mlp.up_proj": (config.intermediate_size, hidden),
                "mlp.down_proj": (hidden, config.intermediate_size),
            }.items()
        }
    return shapes


def _build_layer(stored: Mapping[str, Tensor], index: int, config: LMConfig, weights: WeightFormat) -> Layer:
    def get(name: str) -> Tensor:
        return stored[f"model.layers.{index}.{name}.weight"]

    def norm(name: str) -> Tensor:
        return move(get(name), weights.device, torch.float32)

    width = config.head_dim
    queries, keys = (_pair_up(get(f"self_attn.{name}"), width) for name in ("q_proj", "k_proj"))
    query_norm, key_norm = (_pair_up(norm(f"self_attn.{name}"), width) for name in ("q_norm", "k_norm"))
    head_norm = (
        query_norm.expand(config.num_attention_heads, width),
        key_norm.expand(config.num_key_value_heads, width),
    )
    return Layer(
        input_norm=norm("input_layernorm"),
        qkv=weights.build(torch.cat((queries, keys, get("self_attn.v_proj")))),
        head_norm=torch.cat(head_norm),
        output=weights.build(get("self_attn.o_proj")),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=weights.build(torch.cat((get("mlp.gate_proj"), get("mlp.up_proj")))),
        down=weights.build(get("mlp.down_proj")),
    )


def _pair_up(rows: Tensor, width: int) -> Tensor:
    """Within every head of `width` rows, put row i and row i + width / 2 side by side."""
    return rows.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
