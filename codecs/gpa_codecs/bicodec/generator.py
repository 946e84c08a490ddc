"""BiCodec's wave generator: upsampling convolutions and Snake activations (Descript Audio Codec, Kumar et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpa_codecs.bicodec.config import DILATIONS, GeneratorConfig


class WaveGenerator(nn.Module):
    """Latents (B, input_channel, T) -> waveform (B, 1, T * prod(rates)) in [-1, 1]."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        widths = [config.channels // 2**stage for stage in range(len(config.rates) + 1)]
        self.model = nn.Sequential(
            nn.Conv1d(config.input_channel, widths[0], kernel_size=7, padding=3),
            *(
                UpsamplingBlock(wide, narrow, kernel_size, rate)
                for wide, narrow, kernel_size, rate in zip(
                    widths[:-1], widths[1:], config.kernel_sizes, config.rates, strict=True
                )
            ),
            Snake(widths[-1]),
            nn.Conv1d(widths[-1], 1, kernel_size=7, padding=3),
            nn.Tanh(),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.model(latents)


class UpsamplingBlock(nn.Module):
    """(B, wide, T) -> (B, narrow, T * rate)."""

    def __init__(self, wide: int, narrow: int, kernel_size: int, rate: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Snake(wide),
            nn.ConvTranspose1d(wide, narrow, kernel_size, stride=rate, padding=(kernel_size - rate) // 2),
            *(ResidualUnit(narrow, dilation) for dilation in DILATIONS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ResidualUnit(nn.Module):
    """(B, channels, T) -> same."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Snake(channels),
            nn.Conv1d(channels, channels, kernel_size=7, dilation=dilation, padding=3 * dilation),
            Snake(channels),
            nn.Conv1d(channels, channels, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).add_(x)


class Snake(nn.Module):
    """x + sin(alpha * x) ** 2 / alpha, one alpha per channel (Ziyin et al. 2020): (B, channels, T) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        wave = (x * self.alpha).sin_().square_()
        return wave.mul_((self.alpha + 1e-9).reciprocal()).add_(x)
