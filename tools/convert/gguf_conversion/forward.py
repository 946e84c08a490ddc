"""The checkpoint's own logits for a short prompt, in NumPy and float32: what a converted file is compared with.

Qwen3 (Qwen3 technical report, 2025): pre-norm decoder, grouped-query attention whose queries and keys are normalised
per head, rotary positions, SwiGLU. One layer's weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .source import EMBEDDINGS, HEAD, Source
from .tensors import row_blocks

# float32; NumPy's stubs lose the width of a float on the way.
Floats = NDArray[np.floating]


def reference_logits(source: Source, ids: Sequence[int], columns: Sequence[range]) -> Floats:
    """float32[T, R]: the logits of these columns, ranges of ids, after each of `ids`."""
    table = source.tensors[EMBEDDINGS]
    x = np.concatenate([table.read(range(token, token + 1)) for token in ids])
    for number in range(source.config.num_hidden_layers):
        x = _layer(source, number, x)
    x = _norm(x, source.tensors["output_norm.weight"].read(), source.config.rms_norm_eps)
    head = source.tensors.get(HEAD, table)
    return np.concatenate([x @ head.read(rows).T for rows in row_blocks(head.shape, columns)], axis=1)


def _layer(source: Source, number: int, x: Floats) -> Floats:
    def weight(name: str) -> Floats:
        return source.tensors[f"blk.{number}.{name}.weight"].read()

    epsilon, width = source.config.rms_norm_eps, source.config.head_dim
    inner = _norm(x, weight("attn_norm"), epsilon)
    queries, keys, values = (
        (inner @ weight(name).T).reshape(len(x), -1, width).swapaxes(0, 1) for name in ("attn_q", "attn_k", "attn_v")
    )
    queries = _rotate(_norm(queries, weight("attn_q_norm"), epsilon), source.config.rope_theta)
    keys = _rotate(_norm(keys, weight("attn_k_norm"), epsilon), source.config.rope_theta)
    x = x + _attention(queries, keys, values) @ weight("attn_output").T
    inner = _norm(x, weight("ffn_norm"), epsilon)
    gate = inner @ weight("ffn_gate").T
    gated = gate / (1 + np.exp(-gate)) * (inner @ weight("ffn_up").T)
    return x + gated @ weight("ffn_down").T


def _attention(queries: Floats, keys: Floats, values: Floats) -> Floats:
    """Causal; [heads, T, width] with fewer heads of keys and values -> [T, heads * width]."""
    heads, length, width = queries.shape
    grouped = queries.reshape(len(keys), -1, length, width)
    scores = grouped @ keys[:, None].swapaxes(2, 3) / np.float32(np.sqrt(width))
    scores[..., np.triu(np.ones((length, length), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ values[:, None]
    return mixed.reshape(heads, length, width).swapaxes(0, 1).reshape(length, -1)


def _norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    size = np.sqrt(np.mean(np.square(x), -1, keepdims=True) + np.float32(epsilon))
    return x / size * weight


def _rotate(x: Floats, theta: float) -> Floats:
    """Rotary positions 0, 1, ... along the second axis; element i turns with element i + width / 2."""
    length, width = x.shape[1:]
    angles = np.outer(np.arange(length), theta ** (-np.arange(0, width, 2) / width))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], -1)
