"""The language model's weights in each precision: how they lie on disk, and how the graph multiplies by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from gpa_codecs.errors import CheckpointError
from gpa_codecs.weights import load_weights
from gpa_engines.lm_config import LMConfig

from .lm_graph import Graph

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
"""Weights of one row that share a scale in int8, as in llama.cpp's Q8_0."""

ALIGNMENT = 4096
"""Bytes; a weight that begins at a page of memory can be mapped."""


class SourceWeights:
    """The checkpoint's tensors, mapped, under the names that the graph uses.

    Those are transformers' names without "model." and ".weight"; `layers.N.qkv` and `layers.N.gate_up` are several of
    them on top of each other. Raises CheckpointError for tensors that are missing or of another shape.
    """

    def __init__(self, folder: Path, config: LMConfig) -> None:
        self._stored = load_weights(folder, _shapes(config))
        self._scale = config.head_dim**-0.5

    def matrix(self, name: str) -> Tensor:
        """[N, K], as stored."""
        import torch

        layer, _, part = name.rpartition(".")
        parts = {
            "qkv": [f"{layer}.self_attn.{each}_proj" for each in "qkv"],
            "gate_up": [f"{layer}.mlp.{each}_proj" for each in ("gate", "up")],
        }.get(part, [name])
        if name != "lm_head":
            parts = [f"model.{each}" for each in parts]
        found = [self._stored[f"{each}.weight"] for each in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def norms(self) -> dict[str, NDArray[np.float32]]:
        """Every norm's weight; the query norms hold attention's scale 1 / sqrt(D) too."""
        found = {}
        for name, tensor in self._stored.items():
            if name.endswith("norm.weight"):
                values = tensor.float().numpy()
                scaled = values * np.float32(self._scale) if name.endswith("q_norm.weight") else values
                found[name.removeprefix("model.").removesuffix(".weight")] = scaled
        return found


@dataclass(frozen=True, slots=True)
class Placed:
    """Where an array lies in a file: bytes."""

    offset: int
    size: int


class DataFile:
    """A graph's external data, grown array by array."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = path.name
        self._file = file

    def append(self, array: NDArray[np.generic]) -> Placed:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(array).data)
        return Placed(offset, array.nbytes)


class FloatLinears:
    """float32 or float16 weights [N, K]; products are float32 in both: half precision is a matter of storage."""

    def __init__(self, weights: SourceWeights, data: DataFile, half: bool, done: Callable[[], None]) -> None:
        self._weights, self._data, self._half, self._done = weights, data, half, done

    def product(self, graph: Graph, x: str, name: str, residual: str | None = None) -> str:
        matrix = self._weights.matrix(name)
        stored = to_half(matrix, name) if self._half else matrix.float().numpy()
        placed = self._data.append(stored)
        kind = TensorProto.FLOAT16 if self._half else TensorProto.FLOAT
        weight = graph.external(name, kind, stored.shape, self._data.name, placed.offset, placed.size)
        if self._half:
            weight = graph.add("Cast", weight, to=TensorProto.FLOAT)
        self._done()
        return graph.add("Gemm", x, weight, *([residual] if residual else []), transB=1)


class Int8Linears:
    """8-bit weights, laid out [K, N] with a float32 scale per `BLOCK` of K, expanded by the standard operator.

    ONNX Runtime's CPU provider replaces the expansion and the product by one kernel on 8-bit numbers.
    """

    def __init__(self, weights: SourceWeights, data: DataFile, done: Callable[[], None]) -> None:
        self._weights, self._data, self._done = weights, data, done

    def product(self, graph: Graph, x: str, name: str, residual: str | None = None) -> str:
        quantized, scales = quantize(self._weights.matrix(name), name)
        weight, scale = self._data.append(quantized), self._data.append(scales)
        result = self.expand(graph, x, name, quantized.shape, self._data.name, weight, self._data.name, scale)
        self._done()
        return graph.add("Add", result, residual) if residual else result

    @staticmethod
    def expand(
        graph: Graph,
        x: str,
        name: str,
        shape: tuple[int, ...],
        weight_file: str,
        weight: Placed,
        scale_file: str,
        scale: Placed,
    ) -> str:
        """x [M, K] times a quantised weight of `shape` [K, N] that lies in these files -> [M, N]."""
        rows, columns = shape
        stored = graph.external(name, TensorProto.INT8, (rows, columns), weight_file, weight.offset, weight.size)
        scales = graph.external(
            f"{name}.scales", TensorProto.FLOAT, (rows // BLOCK, columns), scale_file, scale.offset, scale.size
        )
        expanded = graph.add("DequantizeLinear", stored, scales, axis=0, block_size=BLOCK)
        return graph.add("MatMul", x, expanded)


def quantize(matrix: Tensor, name: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[N, K] -> int8[K, N], float32[K / BLOCK, N]: symmetric, the largest of each block becomes 127.

    Works in bands of rows, so that only a part is in memory in float32. Raises CheckpointError when K does not divide.
    """
    count, depth = matrix.shape
    if depth % BLOCK:
        raise CheckpointError(f"{name} has rows of {depth} weights; int8 needs a multiple of {BLOCK}: export fp16")
    quantized = np.empty((depth, count), np.int8)
    scales = np.empty((depth // BLOCK, count), np.float32)
    for start in range(0, count, 8192):
        band = slice(start, start + 8192)
        blocks = matrix[band].float().numpy().reshape(-1, depth // BLOCK, BLOCK)
        band_scales = np.maximum(np.abs(blocks).max(axis=2) / np.float32(127), np.float32(1e-12))
        rounded = np.clip(np.rint(blocks / band_scales[..., None]), -127, 127).astype(np.int8)
        quantized[:, band] = rounded.reshape(len(rounded), depth).T
        scales[:, band] = band_scales.T
    return quantized, scales


def to_half(matrix: Tensor, name: str) -> NDArray[np.float16]:
    """[N, K] in float16. Raises CheckpointError for a weight beyond its range."""
    values = matrix.half().numpy()
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name} has weights beyond float16's 65504: export fp32")
    return values


def _shapes(config: LMConfig) -> dict[str, tuple[int, ...]]:
    hidden, width, inner = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    table = (config.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    for index in range(config.num_hidden_layers):
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.q_norm": (width,),
            "self_attn.k_norm": (width,),
            "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes
