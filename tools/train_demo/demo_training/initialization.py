"""Starting values of what the product's networks leave empty, because they only ever load it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gpa_codecs.bicodec.generator import Snake
from gpa_codecs.bicodec.speaker import PerceiverResampler, ScaledUnitNorm
from gpa_codecs.bicodec.vocos import AdaptiveLayerNorm, ConvNeXtBlock

_LAYER_SCALE = 0.3  # of a ConvNeXt block's branch: small at first, so that depth does no harm


def initialize(network: nn.Module) -> None:
    """Give every parameter that has no value one; torch has initialised the usual layers. Codebooks become learnable,
    and are filled from data later.
    """
    starts: dict[type[nn.Module], Any] = {
        ConvNeXtBlock: lambda block: nn.init.constant_(block.gamma, _LAYER_SCALE),
        AdaptiveLayerNorm: _start_adaptive_norm,
        Snake: lambda snake: nn.init.ones_(snake.alpha),
        PerceiverResampler: lambda sampler: nn.init.normal_(sampler.latents),
        ScaledUnitNorm: lambda norm: nn.init.ones_(norm.gamma),
        nn.Embedding: lambda table: nn.init.normal_(table.weight.requires_grad_(True)),
    }
    with torch.no_grad():
        for module in network.modules():
            if start := starts.get(type(module)):
                start(module)


def _start_adaptive_norm(norm: AdaptiveLayerNorm) -> None:
    """A plain layer norm that hardly listens to its condition yet."""
    for linear, value in ((norm.scale, 1.0), (norm.shift, 0.0)):
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.constant_(linear.bias, value)
