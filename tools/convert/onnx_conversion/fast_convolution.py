"""The generator's wide convolutions with 10 multiplications for four outputs instead of 28.

A convolution of width seven is the product of two polynomials. Evaluated at ten points, the product is ten
multiplications, whatever the number of channels they sum over: Toom-Cook's method, known as Winograd's for neural
networks (Lavin & Gray 2016). ONNX Runtime's matrix products run at the processor's peak, so that fewer of them is
what is left to gain. The points are those of small fractions with the least rounding error in float32.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm, log2

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 7
TILE = 4
"""Outputs that are computed together."""

LEAST_CHANNELS = 128
"""With fewer, what is saved in products is lost in moving the values about."""

_COUNT = TILE + WIDTH - 1
_POINTS = [Fraction(0), *(Fraction(sign * top, 8) for top in (3, 6, 10, 20) for sign in (1, -1))]

Matrix = list[list[Fraction]]


def speed_up(network: nn.Module) -> nn.Module:
    """Put the fast form in the place of every convolution of `network` that it suits, and return `network`."""
    for name, module in network.named_children():
        if isinstance(module, nn.Conv1d) and _suits(module):
            setattr(network, name, FastConv1d(module))
        else:
            speed_up(module)
    return network


def _suits(conv: nn.Conv1d) -> bool:
    (dilation,) = conv.dilation
    return (
        conv.kernel_size == (WIDTH,)
        and conv.stride == (1,)
        and conv.groups == 1
        and conv.padding == (dilation * (WIDTH // 2),)
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
        and conv.in_channels == conv.out_channels
    )


class FastConv1d(nn.Module):
    """A convolution of width seven that keeps the length, possibly dilated: (1, C, N) -> (1, K, N)."""

    inputs: Tensor
    products: Tensor
    outputs: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        assert conv.bias is not None
        (self.dilation,) = conv.dilation
        inputs, weights, outputs = (torch.tensor(matrix, dtype=torch.float64) for matrix in _transforms())
        products = torch.einsum("pw,kcw->pkc", weights, conv.weight.double())
        dtype = conv.weight.dtype
        self.register_buffer("inputs", inputs.to(dtype).view(_COUNT, 1, *self._lying(_COUNT)))
        self.register_buffer("products", products.to(dtype).contiguous())
        self.register_buffer("outputs", outputs.to(dtype))
        self.register_buffer("bias", conv.bias.detach().clone().view(-1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # Neighbours in the convolution lie `dilation` apart; a block holds one tile for each offset below that.
        block = TILE * self.dilation
        blocks = (x.shape[2] + block - 1) // block
        left, beyond = self.dilation * (WIDTH // 2), -(-(WIDTH - 1) // TILE)
        padded = F.pad(x, (left, (blocks + beyond) * block - x.shape[2] - left))
        rows = padded.view(padded.shape[1], 1, *self._lying(-1, self.dilation))
        points = F.conv2d(rows, self.inputs, stride=self._lying(TILE)).flatten(2).transpose(0, 1)
        tiles = self.outputs @ (self.products @ points).transpose(0, 1) + self.bias.unsqueeze(1)
        samples = tiles.unflatten(2, (-1, self.dilation)).transpose(1, 2).reshape(1, tiles.shape[0], -1)
        return samples[:, :, : x.shape[2]]

    def _lying(self, along: int, across: int = 1) -> tuple[int, int]:
        """Height and width of an image with time along its height, but where it would be one pixel wide: there ONNX
        Runtime takes four times as long as along the width."""
        return (across, along) if self.dilation == 1 else (along, across)


@lru_cache
def _transforms() -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """What makes ten values of ten inputs, of seven weights, and of ten products the four outputs.

    Correlation is the transpose of a product of polynomials of TILE and WIDTH coefficients: both are evaluated at nine
    points and at infinity, multiplied, and interpolated. Each point's inputs are scaled to small whole numbers over a
    power of two, which float32 holds exactly; its weights take the inverse.
    """
    outputs = [list(column) for column in zip(*_powers(TILE), strict=True)]
    weights = _powers(WIDTH)
    inputs = [list(column) for column in zip(*_inverse(_powers(_COUNT)), strict=True)]
    for row, values in enumerate(inputs):
        denominator = lcm(*(value.denominator for value in values))
        scale = Fraction(denominator, gcd(*(int(value * denominator) for value in values)))
        scale *= Fraction(2) ** -round(log2(max(abs(value * scale) for value in values)))
        inputs[row] = [value * scale for value in values]
        weights[row] = [value / scale for value in weights[row]]
    return _floats(inputs), _floats(weights), _floats(outputs)


def _powers(count: int) -> Matrix:
    """The first `count` powers of each point, a row for each; at infinity, only the highest counts."""
    finite = [[point**power for power in range(count)] for point in _POINTS]
    return [*finite, [Fraction(power == count - 1) for power in range(count)]]


def _inverse(matrix: Matrix) -> Matrix:
    """Gauss-Jordan elimination."""
    size = len(matrix)
    rows = [[*values, *(Fraction(row == column) for column in range(size))] for row, values in enumerate(matrix)]
    for column in range(size):
        pivot = next(row for row in range(column, size) if rows[row][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for row in (row for row in range(size) if row != column):
            factor = rows[row][column]
            rows[row] = [value - factor * other for value, other in zip(rows[row], rows[column], strict=True)]
    return [values[size:] for values in rows]


def _floats(matrix: Matrix) -> list[list[float]]:
    return [[float(value) for value in values] for values in matrix]
