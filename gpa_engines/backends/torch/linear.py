"""Linear layers by weight format: how a weight is held, and the kernel that multiplies with it.

Every CPU kernel here computes a row alike whatever rows are beside it, to the last bit (float32: from two rows on),
which is what makes a request's tokens independent of its neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gpa_engines.backends.torch.device import move


class Linear(Protocol):
    """x: [M, K] in the format's compute dtype -> [M, N] in the same."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def wide(self, x: Tensor) -> Tensor:
        """The same product by the kernel that is faster for many rows; the result may differ in rounding."""
        ...


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How the linear layers of a model are held.

    compute: dtype of activations and KV cache. build: a weight [N, K] of any float dtype -> a layer on the device.
    wide_from: a request's chunk of at least so many tokens goes through `Linear.wide`; None when both are the same.
    min_rows: fewer rows are padded to so many, because the kernel for fewer rounds differently.
    """

    dtype: str
    device: torch.device
    compute: torch.dtype
    build: Callable[[Tensor], Linear]
    wide_from: int | None = None
    min_rows: int = 1


def weight_format(dtype: str, device: torch.device) -> WeightFormat:
    """The format for a dtype of `device.DTYPES` on a device: prepacked oneDNN weights and int8 kernels on a CPU."""
    if device.type != "cpu":
        compute = torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)
        if dtype == "int8":
            return WeightFormat(dtype, device, compute, lambda weight: ExpandedInt8Linear(weight, device))
        return WeightFormat(dtype, device, compute, lambda weight: PlainLinear(move(weight, device, compute)))
    if dtype == "int8":
        # Measured on two AVX-512 cores: up to 16 rows the int8 kernel is as fast, at 256 three times slower.
        return WeightFormat(dtype, device, torch.bfloat16, Int8Linear, wide_from=24)
    if dtype == "float16":
        return WeightFormat(dtype, device, torch.float16, HalfLinear, wide_from=16)
    compute = getattr(torch, dtype)
    if _can_pack(compute):
        return WeightFormat(dtype, device, compute, lambda weight: PackedLinear(weight, compute), min_rows=2)
    return WeightFormat(dtype, device, compute, lambda weight: PlainLinear(weight.to(compute)), min_rows=2)


class PlainLinear:
    """A weight as it is; keeps a view where it is given one."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    wide = __call__


class PackedLinear:
    """A weight in oneDNN's own blocked layout: no repacking per call, about twice the speed of F.linear at one row.

    A weight of very many rows is packed part by part, so that only one part at a time is in memory twice.
    """

    # The row count that the layout is chosen for; 16 measured best or equal from 1 to 256 rows.
    ROWS = 16
    PART = 32768

    def __init__(self, weight: Tensor, compute: torch.dtype) -> None:
        pack = torch.ops.mkldnn._reorder_linear_weight.default
        parts = weight.split(self.PART)
        self.parts = [pack(part.to(compute).contiguous(), self.ROWS) for part in parts]
        self.kernel = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        products = [self.kernel(x, part, None, "none", [], "") for part in self.parts]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    wide = __call__


class Int8Linear:
    """Weight-only int8 with one scale per output channel, symmetric (as LLM.int8()'s weights, Dettmers et al. 2022)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.scales = _quantize(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm.default(x, self.weight, self.scales)

    def wide(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)).mul_(self.scales)


class ExpandedInt8Linear:
    """The same weights on a device without an int8 kernel: expanded for every product, held in a quarter of float32."""

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        self.weight, self.scales = (part.to(device) for part in _quantize(weight))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)).mul_(self.scales)

    wide = __call__


class HalfLinear:
    """float16 on a CPU, whose matrix kernel is slow without hardware support: many rows are multiplied in float32."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.to(torch.float16)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def wide(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float()).to(x.dtype)


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> int8[N, K], bfloat16[N], in blocks of rows; a scale is rounded before it is used, so that its rounding
    costs nothing."""
    quantized = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.bfloat16)
    for start in range(0, len(weight), 8192):
        rows = slice(start, start + 8192)
        block = weight[rows].float()
        scales[rows] = (block.abs().amax(dim=1) / 127).clamp_(min=1e-12)
        quantized[rows] = (block / scales[rows, None].float()).round_().clamp_(-127, 127)
    return quantized, scales


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's packed linear for the dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        weight = torch.eye(16, dtype=dtype)
        return torch.equal(PackedLinear(weight, dtype)(weight), weight)
    except (RuntimeError, AttributeError):
        return False
