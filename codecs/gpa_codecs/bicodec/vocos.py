"""BiCodec's feature encoder and decoder: ConvNeXt backbones (Vocos, Siuzdak 2023) between linear projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpa_codecs.bicodec.config import VocosConfig

_NORM_EPS = 1e-6
_SAMPLING_LAYERS = 2  # ConvNeXt blocks beside each sampling block, fixed in Spark-TTS.


class FeatureEncoder(nn.Module):
    """wav2vec 2.0 features (B, input_channels, T) -> latents (B, out_channels, T)."""

    def __init__(self, config: VocosConfig) -> None:
        super().__init__()
        self.encoder = VocosBackbone(config.input_channels, config, config.num_layers)
        self.downsample = _sampling_stack(config)
        self.project = nn.Linear(config.dim, config.out_channels)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.downsample(self.encoder(features).transpose(1, 2))
        return self.project(hidden.transpose(1, 2)).transpose(1, 2)


class FeatureDecoder(nn.Module):
    """Quantised latents (B, input_channels, T) and a speaker vector (B, condition_dim) -> (B, out_channels, T)."""

    def __init__(self, config: VocosConfig) -> None:
        super().__init__()
        self.linear_pre = nn.Linear(config.input_channels, config.dim)
        self.downsample = _sampling_stack(config)
        self.vocos_backbone = VocosBackbone(config.dim, config, config.num_layers, config.condition_dim)
        self.linear = nn.Linear(config.dim, config.out_channels)

    def forward(self, latents: Tensor, condition: Tensor) -> Tensor:
        hidden = self.downsample(self.linear_pre(latents.transpose(1, 2)).transpose(1, 2))
        return self.linear(self.vocos_backbone(hidden, condition)).transpose(1, 2)


class VocosBackbone(nn.Module):
    """(B, input_channels, T) -> (B, T, dim); its norms adapt to a condition (B, condition_dim) if there is one."""

    def __init__(self, input_channels: int, config: VocosConfig, num_layers: int, condition_dim: int = 0) -> None:
        super().__init__()
        self.embed = nn.Conv1d(input_channels, config.dim, kernel_size=7, padding=3)
        self.norm = _norm(config.dim, condition_dim)
        self.convnext = nn.ModuleList(
            ConvNeXtBlock(config.dim, config.intermediate_dim, condition_dim) for _ in range(num_layers)
        )
        self.final_layer_norm = nn.LayerNorm(config.dim, eps=_NORM_EPS)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = _normalize(self.norm, self.embed(x).transpose(1, 2), condition)
        for block in self.convnext:
            x = block(x, condition)
        return self.final_layer_norm(x)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution and a two-layer perceptron, scaled and added (Liu et al. 2022): (B, T, dim) -> same."""

    def __init__(self, dim: int, intermediate_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = _norm(dim, condition_dim)
        self.pwconv1 = nn.Linear(dim, intermediate_dim)
        self.pwconv2 = nn.Linear(intermediate_dim, dim)
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        hidden = self.dwconv(x.transpose(1, 2)).transpose(1, 2)
        hidden = self.pwconv2(F.gelu(self.pwconv1(_normalize(self.norm, hidden, condition))))
        return torch.addcmul(x, hidden, self.gamma)


class AdaptiveLayerNorm(nn.Module):
    """Layer norm whose scale and shift are linear in a condition (B, condition_dim)."""

    def __init__(self, dim: int, condition_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Linear(condition_dim, dim)
        self.shift = nn.Linear(condition_dim, dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        normal = F.layer_norm(x, (self.dim,), eps=_NORM_EPS)
        return normal * self.scale(condition).unsqueeze(1) + self.shift(condition).unsqueeze(1)


class SamplingBlock(nn.Module):
    """Spark-TTS's resampling block at ratio 1, the only one released: it adds its input up three times."""

    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * x


class _SamplingStage(nn.Sequential):
    """(B, dim, T) -> same, through a sampling block and a small backbone."""

    def __init__(self, config: VocosConfig) -> None:
        super().__init__(SamplingBlock(), VocosBackbone(config.dim, config, _SAMPLING_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


def _sampling_stack(config: VocosConfig) -> nn.Sequential:
    return nn.Sequential(*(_SamplingStage(config) for _ in range(config.sampling_blocks)))


def _norm(dim: int, condition_dim: int) -> nn.Module:
    return AdaptiveLayerNorm(dim, condition_dim) if condition_dim else nn.LayerNorm(dim, eps=_NORM_EPS)


def _normalize(norm: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    return norm(x) if condition is None else norm(x, condition)
