"""Linear layers: weights as they are stored, and the kernels that multiply with them.

On Linux' CPU every kernel here computes a row alike whatever rows are beside it, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from gpa_engines.checkpoint.mlx_quantization import Quantization


class Linear(Protocol):
    """x: [M, K] in the format's compute dtype -> [M, N] in the same."""

    def __call__(self, x: mx.array) -> mx.array: ...


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A matrix of N rows: float[N, K], or uint32[N, K · bits / 32] with scales and biases, float[N, K / group]."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def arrays(self) -> list[mx.array]:
        """What there is of the three."""
        return [array for array in (self.weight, self.scales, self.biases) if array is not None]

    def select(self, ids: NDArray[np.int64]) -> StoredWeight:
        """The rows of these ascending ids; a view when they are contiguous."""
        first, last = int(ids[0]), int(ids[-1])
        if last - first + 1 == len(ids):
            return self.map(lambda array: array[first : last + 1])
        return self.take(mx.array(ids.astype(np.int32)))

    def take(self, rows: mx.array) -> StoredWeight:
        """Rows by number, int32[n]; MLX does not check them."""
        return self.map(lambda array: array[rows])

    def map(self, change: Callable[[mx.array], mx.array]) -> StoredWeight:
        """The same change to all of its arrays."""
        return StoredWeight(*map(change, self.arrays))


def join(parts: Sequence[StoredWeight]) -> StoredWeight:
    """The rows of all parts, one after the other; either all of them are quantised or none."""
    return StoredWeight(
        *(mx.concatenate(list(arrays)) for arrays in zip(*(part.arrays for part in parts), strict=True))
    )


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How the linear layers of a model are held.

    compute: dtype of activations and KV cache. quantization: of the matrices that have scales. transposed: hold a plain
    matrix as [K, N]. The reference BLAS of MLX's Linux wheel multiplies with that more than twice as fast (measured at
    1 to 64 rows), to the same last bit; Metal has kernels for both.
    """

    compute: mx.Dtype
    quantization: Quantization | None
    transposed: bool

    def build(self, stored: StoredWeight) -> Linear:
        """A layer, evaluated, so that it may be used on any thread and holds nothing that it was made of."""
        if stored.scales is not None:
            assert self.quantization is not None
            layer = QuantizedLinear(self.widen(stored), self.quantization)
            mx.eval(layer.weight.arrays)
            return layer
        # Turned before it is widened: that takes the least memory.
        matrix = mx.contiguous(stored.weight.T) if self.transposed else stored.weight
        matrix = matrix.astype(self.compute)
        mx.eval(matrix)
        return DenseLinear(matrix if self.transposed else matrix.T)

    def widen(self, stored: StoredWeight) -> StoredWeight:
        """A quantised weight with scales and biases in the compute dtype."""
        assert stored.scales is not None
        assert stored.biases is not None
        return StoredWeight(stored.weight, stored.scales.astype(self.compute), stored.biases.astype(self.compute))

    def values(self, stored: StoredWeight) -> mx.array:
        """float32[N, K], what the stored numbers stand for."""
        if stored.scales is None:
            return stored.weight.astype(mx.float32)
        assert self.quantization is not None
        return dequantize(stored, self.quantization)


class DenseLinear:
    """matrix: [K, N]."""

    def __init__(self, matrix: mx.array) -> None:
        self.matrix = matrix

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.matrix


class QuantizedLinear:
    """Weight-only quantisation by groups: MLX expands a group as it multiplies."""

    def __init__(self, weight: StoredWeight, quantization: Quantization) -> None:
        self.weight = weight
        self.quantization = quantization

    def __call__(self, x: mx.array) -> mx.array:
        group_size, bits = self.quantization.group_size, self.quantization.bits
        return mx.quantized_matmul(x, *self.weight.arrays, transpose=True, group_size=group_size, bits=bits)


def quantize(weight: mx.array, quantization: Quantization) -> StoredWeight:
    """float[N, K] -> its groups; scales and biases are float32, since MLX gives them the type of the weight."""
    packed = mx.quantize(weight.astype(mx.float32), group_size=quantization.group_size, bits=quantization.bits)
    return StoredWeight(*packed)


def dequantize(stored: StoredWeight, quantization: Quantization) -> mx.array:
    """float32[N, K]."""
    weight, *scaling = stored.arrays
    scales, biases = (array.astype(mx.float32) for array in scaling)
    return mx.dequantize(weight, scales, biases, group_size=quantization.group_size, bits=quantization.bits)
