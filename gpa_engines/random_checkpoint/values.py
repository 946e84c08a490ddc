"""Random tensors that are the same bits on every machine, and the safetensors file that holds them.

A value is an unsigned 16-bit integer from a counter-based generator (Philox, Salmon et al. 2011) keyed by
sha256(seed, file, tensor name), brought into its interval by one float32 subtraction, multiplication and addition.
IEEE 754 defines each of these to the last bit, which no normal(), exp() or sin() of a libm is. bfloat16 is rounded from
there by hand (to nearest, ties to even), as NumPy has no such type.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

Dtype = Literal["F32", "BF16", "I64"]
ITEM_SIZES: dict[Dtype, int] = {"F32": 4, "BF16": 2, "I64": 8}

_CHUNK = 1 << 20  # values made at a time: bounds the memory whatever the tensor's size


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint: values uniform in [low, high]; a zero counter when dtype is I64."""

    name: str
    shape: tuple[int, ...]
    low: float
    high: float
    dtype: Dtype = "F32"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return self.size * ITEM_SIZES[self.dtype]


def write_safetensors(
    path: Path, tensors: Sequence[Tensor], key: str, *, advance: Callable[[int], None] | None = None
) -> None:
    """Write `tensors` to `path` in the safetensors format, one chunk in memory at a time.

    The values of a tensor depend on `key` and its name alone. `advance(n)` is called after every n bytes of tensor
    data. Raises OSError.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    for tensor in ordered:
        if tensor.name in header:
            raise ValueError(f"two tensors are named {tensor.name}")
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts on a multiple of 8 bytes, as the format asks
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ordered:
            _write_data(file, tensor, key, advance)


def uniform_chunks(tensor: Tensor, key: str) -> Iterator[NDArray[np.float32]]:
    """Values of a floating tensor in storage order, as float32[<= 2^20] pieces before any rounding to bfloat16."""
    digest = hashlib.sha256(f"{key}:{tensor.name}".encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    step = np.float32((tensor.high - tensor.low) / 65535)
    middle = np.float32((tensor.high + tensor.low) / 2)
    for start in range(0, tensor.size, _CHUNK):
        count = min(_CHUNK, tensor.size - start)
        raw = np.asarray(bits.random_raw((count + 3) // 4)).astype("<u8", copy=False).view("<u2")[:count]
        values = raw.astype(np.float32)
        values -= np.float32(32767.5)
        values *= step
        values += middle
        yield values


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even; finite values only."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _write_data(file: BinaryIO, tensor: Tensor, key: str, advance: Callable[[int], None] | None) -> None:
    if tensor.dtype == "I64":
        file.write(bytes(tensor.nbytes))
        return
    for values in uniform_chunks(tensor, key):
        data = to_bfloat16(values) if tensor.dtype == "BF16" else values.astype("<f4", copy=False)
        file.write(data.data)
        if advance is not None:
            advance(data.nbytes)
