"""BiCodec's speaker encoder: ECAPA-TDNN frames (Desplanques et al. 2020) read by a perceiver resampler."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpa_codecs.bicodec.config import SpeakerConfig

# Sizes that Spark-TTS fixes in its code rather than in the configuration.
_CHANNELS = 512
_FRAME_CHANNELS = 1536
_RES2_SCALE = 8
_SQUEEZE_CHANNELS = 128
_PERCEIVER_LAYERS = 2
_HEADS = 8
_HEAD_DIM = 64


class EcapaTdnn(nn.Module):
    """Mel spectrogram (B, num_mels, T) -> frame features (B, 1536, T), before the pooling that BiCodec does not use."""

    def __init__(self, num_mels: int) -> None:
        super().__init__()
        self.layer1 = ConvReluNorm(num_mels, _CHANNELS, kernel_size=5)
        self.layer2 = SqueezeRes2Block(dilation=2)
        self.layer3 = SqueezeRes2Block(dilation=3)
        self.layer4 = SqueezeRes2Block(dilation=4)
        self.conv = nn.Conv1d(3 * _CHANNELS, _FRAME_CHANNELS, kernel_size=1)

    def forward(self, mel: Tensor) -> Tensor:
        first = self.layer2(self.layer1(mel))
        second = self.layer3(first)
        return F.relu(self.conv(torch.cat((first, second, self.layer4(second)), dim=1)))


class PerceiverResampler(nn.Module):
    """Frame features (B, T, 1536) -> as many latents as a voice has codes (B, token_num, latent_dim)."""

    def __init__(self, config: SpeakerConfig) -> None:
        super().__init__()
        dim = config.latent_dim
        self.proj_context = nn.Linear(_FRAME_CHANNELS, dim)
        self.latents = nn.Parameter(torch.empty(config.token_num, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList((CrossAttention(dim), _gated_feed_forward(dim))) for _ in range(_PERCEIVER_LAYERS)
        )
        self.norm = ScaledUnitNorm(dim)

    def forward(self, frames: Tensor) -> Tensor:
        context = self.proj_context(frames)
        latents = self.latents.expand(len(frames), -1, -1)
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            latents = latents + attention(latents, context)
            latents = latents + feed_forward(latents)
        return self.norm(latents)


class CrossAttention(nn.Module):
    """Latents (B, L, dim) attend to themselves and the context (B, T, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, _HEADS * _HEAD_DIM, bias=False)
        self.to_kv = nn.Linear(dim, 2 * _HEADS * _HEAD_DIM, bias=False)
        self.to_out = nn.Linear(_HEADS * _HEAD_DIM, dim, bias=False)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        keys, values = self.to_kv(torch.cat((latents, context), dim=1)).chunk(2, dim=-1)
        heads = [x.unflatten(-1, (_HEADS, _HEAD_DIM)).transpose(1, 2) for x in (self.to_q(latents), keys, values)]
        mixed = F.scaled_dot_product_attention(*heads)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class GatedGelu(nn.Module):
    """The second half, through GELU, gates the first (Shazeer 2020): (..., 2 * C) -> (..., C)."""

    def forward(self, x: Tensor) -> Tensor:
        values, gate = x.chunk(2, dim=-1)
        return values * F.gelu(gate)


class ScaledUnitNorm(nn.Module):
    """RMS norm without epsilon: the vector at length sqrt(dim), times gamma."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * self.gamma


class SqueezeRes2Block(nn.Module):
    """(B, 512, T) -> same: Res2Net convolution between two pointwise ones, squeeze-excitation, residual."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.se_res2block = nn.Sequential(
            ConvReluNorm(_CHANNELS, _CHANNELS, kernel_size=1),
            Res2Conv(dilation),
            ConvReluNorm(_CHANNELS, _CHANNELS, kernel_size=1),
            SqueezeExcitation(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se_res2block(x)


class Res2Conv(nn.Module):
    """Eight groups of channels in a chain (Gao et al. 2019): each is convolved with the result of the one before it."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        width, steps = _CHANNELS // _RES2_SCALE, _RES2_SCALE - 1
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, kernel_size=3, padding=dilation, dilation=dilation) for _ in range(steps)
        )
        self.bns = nn.ModuleList(StoredBatchNorm(width) for _ in range(steps))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.chunk(_RES2_SCALE, dim=1)
        outputs, carried = [], None
        for group, conv, norm in zip(groups, self.convs, self.bns, strict=False):
            carried = norm(F.relu(conv(group if carried is None else carried + group)))
            outputs.append(carried)
        return torch.cat((*outputs, groups[-1]), dim=1)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the channels' means (Hu et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(_CHANNELS, _SQUEEZE_CHANNELS)
        self.linear2 = nn.Linear(_SQUEEZE_CHANNELS, _CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.linear2(F.relu(self.linear1(x.mean(dim=2))))).unsqueeze(2)


class ConvReluNorm(nn.Module):
    """Convolution, ReLU, then batch norm with the stored statistics; keeps the length."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.bn = StoredBatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.relu(self.conv(x)))


class StoredBatchNorm(nn.Module):
    """Batch norm with the statistics of the training (Ioffe & Szegedy 2015): (B, channels, T) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.running_mean = nn.Parameter(torch.empty(channels))
        self.running_var = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def _gated_feed_forward(dim: int) -> nn.Sequential:
    inner = int(dim * 4 * 2 / 3)
    return nn.Sequential(nn.Linear(dim, 2 * inner), GatedGelu(), nn.Linear(inner, dim))
