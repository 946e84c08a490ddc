"""wav2vec 2.0 up to the hidden states that BiCodec reads; module names are those of the released weight file."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpa_codecs.wav2vec2.config import FEATURE_STATES, Wav2Vec2Config


class Wav2Vec2Features(nn.Module):
    """Normalised samples (B, N) -> mean of hidden states 11, 14 and 16: (B, T, hidden_size), T = (N - 400) // 320 + 1.

    Hidden state 16 is what layer 16 puts out, before any final norm; later layers of a checkpoint are never built.
    """

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.feature_extractor = _ConvExtractor(config)
        self.feature_projection = _Projection(config)
        self.encoder = _Encoder(config)

    def forward(self, samples: Tensor) -> Tensor:
        hidden = self.feature_projection(self.feature_extractor(samples))
        hidden = hidden + self.encoder.pos_conv_embed(hidden)
        total = torch.zeros_like(hidden)
        for number, layer in enumerate(self.encoder.layers, start=1):
            hidden = layer(hidden)
            if number in FEATURE_STATES:
                total += hidden
        return total / len(FEATURE_STATES)


class _ConvExtractor(nn.Module):
    """(B, N) -> (B, T, conv_dim[-1])."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(
            _ConvLayer(*geometry, bias=config.conv_bias)
            for geometry in zip(
                (1, *config.conv_dim[:-1]), config.conv_dim, config.conv_kernel, config.conv_stride, strict=True
            )
        )

    def forward(self, samples: Tensor) -> Tensor:
        hidden = samples.unsqueeze(1)
        for layer in self.conv_layers:
            hidden = layer(hidden)
        return hidden.transpose(1, 2)


class _ConvLayer(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, *, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, bias=bias)
        self.layer_norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer_norm(self.conv(x).transpose(1, 2))).transpose(1, 2)


class _Projection(nn.Module):
    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.layer_norm(x))


class _Encoder(nn.Module):
    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.pos_conv_embed = _PositionalConv(config)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(max(FEATURE_STATES)))


class _PositionalConv(nn.Module):
    """Relative positions from a wide grouped convolution: (B, T, hidden_size) -> same."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        kernel_size = config.num_conv_pos_embeddings
        self.conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            kernel_size,
            padding=kernel_size // 2,
            groups=config.num_conv_pos_embedding_groups,
        )

    def forward(self, x: Tensor) -> Tensor:
        # An even kernel puts out one frame too many, at the end.
        return F.gelu(self.conv(x.transpose(1, 2))[:, :, : x.shape[1]]).transpose(1, 2)


class _Layer(nn.Module):
    """A transformer layer with its norms before attention and feed-forward: (B, T, hidden_size) -> same."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = _FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layer_norm(x))
        return x + self.feed_forward(self.final_layer_norm(x))


class _Attention(nn.Module):
    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(F.gelu(self.intermediate_dense(x)))
