"""The GLM-4-Voice tokenizer's network (Zeng et al. 2024); module names are those of the released weight file."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpa_codecs.glm_tokenizer.config import CONV_STRIDE, GlmTokenizerConfig


class GlmEncoder(nn.Module):
    """Log-mel spectrogram (B, num_mel_bins, F) -> codes int64 (B, F // 8); F is a multiple of eight."""

    def __init__(self, config: GlmTokenizerConfig) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.pooling = config.pooling_kernel_size
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=CONV_STRIDE)
        self.embed_positions = nn.Embedding.from_pretrained(torch.empty(config.max_source_positions, config.d_model))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.codebook = nn.Embedding.from_pretrained(torch.empty(config.codebook_size, config.d_model))

    def forward(self, log_mel: Tensor, frames: int) -> Tensor:
        """frames: how many of the F frames are audio rather than padding, equal for all rows of the batch."""
        hidden = F.gelu(self.conv1(_pad_left(log_mel)))
        hidden = F.gelu(self.conv2(_pad_left(hidden))).transpose(1, 2)
        hidden = hidden + self.embed_positions.weight[: hidden.shape[1]]
        # Rounded up without a negative number: a traced graph would round that towards zero.
        visible = self._visible_positions(hidden.shape[1], (frames + CONV_STRIDE - 1) // CONV_STRIDE, hidden.device)
        for layer in self.layers:
            hidden = layer(hidden, visible)
        pooled = F.avg_pool1d(hidden.transpose(1, 2), self.pooling).transpose(1, 2)
        return _nearest(pooled, self.codebook.weight)

    def _visible_positions(self, length: int, valid: int, device: torch.device) -> Tensor:
        """bool (length, length): a query sees all of its own block and everything before it, except padding."""
        positions = torch.arange(length, device=device)
        blocks = positions // self.block_size
        return (blocks[:, None] >= blocks[None, :]) & (positions[None, :] < valid)


class _Layer(nn.Module):
    """A transformer layer with its norms before attention and feed-forward: (B, T, d_model) -> same."""

    def __init__(self, config: GlmTokenizerConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), visible)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class _Attention(nn.Module):
    def __init__(self, config: GlmTokenizerConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        queries, keys, values = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def _pad_left(x: Tensor) -> Tensor:
    """Two frames of zeros in front make a convolution of width three causal."""
    return F.pad(x, (2, 0))


def _nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codebook entry (K, D) of each vector (B, T, D) in plain L2: int64 (B, T); the first of equals wins.

    A vector's own length is the same for every entry and is left out, which loses nothing but rounding errors.
    """
    squares = torch.linalg.vector_norm(codebook, dim=1).square()
    return torch.addmm(squares, vectors.flatten(0, 1), codebook.T, alpha=-2).argmin(dim=1).view(len(vectors), -1)
