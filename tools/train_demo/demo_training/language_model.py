"""Qwen3 (Qwen3 technical report, 2025) for training, with the parameter names of the released weight file."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpa_engines.lm_config import LMConfig

_INITIAL_STD = 0.02


class LanguageModel(nn.Module):
    """Ids (B, T) -> hidden states; the head is the embedding."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.model = _Trunk(config)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # Branches are damped, so that the trunk's level does not grow with the depth (GPT-2).
                damped = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = _INITIAL_STD / math.sqrt(2 * config.num_hidden_layers) if damped else _INITIAL_STD
                nn.init.normal_(parameter, std=2 * std)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (B, T) -> float32 (B, T, hidden_size), after the final norm. Padding goes to the right."""
        return self.model(ids)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits of the ids `rows` int64 (R): (..., hidden_size) -> (..., R)."""
        return hidden @ self.model.embed_tokens.weight[rows].T


class _Trunk(nn.Module):
    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = _Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed_tokens(ids)
        rotation = self._rotation(ids.shape[1], ids.device)
        for layer in self.layers:
            hidden = layer(hidden, rotation)
        return self.norm(hidden)

    def _rotation(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        width = self.config.head_dim
        exponents = torch.arange(0, width, 2, device=device).float() / width
        angles = torch.arange(length, device=device).float()[:, None] / self.config.rope_theta**exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class _Layer(nn.Module):
    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.input_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _FeedForward(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Module):
    """Grouped queries (Ainslie et al. 2023) with normalised heads and rotary positions (Su et al. 2021)."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.width = config.head_dim
        hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)
        self.q_norm = _Norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = _Norm(config.head_dim, config.rms_norm_eps)
        self.group = config.num_attention_heads // config.num_key_value_heads

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        queries, keys, values = (
            projection(x).unflatten(-1, (-1, self.width)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries = _rotated(self.q_norm(queries).transpose(1, 2), rotation)
        keys = _rotated(self.k_norm(keys).transpose(1, 2), rotation).repeat_interleave(self.group, 1)
        values = values.transpose(1, 2).repeat_interleave(self.group, 1)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + width / 2) of (B, heads, T, width)."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class _Norm(nn.RMSNorm):
    """In float32, also where the products are not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())
