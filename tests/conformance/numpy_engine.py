"""An engine that is written anew, in NumPy: what someone with other hardware would bring. It needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpa_engines.engine import Engine, EngineInfo
from gpa_engines.lm_config import LMConfig
from gpa_engines.step_engine import StepEngine
from gpa_engines.step_model import Slot, SlotRequest, StepRow

Array = NDArray[np.floating]


def create(model_dir: Path) -> Engine:
    """float32, one request per forward pass."""
    model = NumpyModel(model_dir)
    info = EngineInfo(
        "numpy", "cpu", "float32", model.vocab_size, model.max_context, frozenset(("logits", "allowed", "seed"))
    )
    return StepEngine(info, model, prefill_chunk=64)


class NumpyModel:
    """A step model that keeps keys and values per slot."""

    max_batch = 4
    max_tokens = 4096

    def __init__(self, model_dir: Path) -> None:
        self.config = LMConfig.from_file(model_dir / "config.json")
        self.weights = read_safetensors(model_dir / "model.safetensors")
        self.vocab_size = self.config.vocab_size
        self.max_context = self.config.max_position_embeddings
        self._slots: dict[int, list[tuple[Array, Array]]] = {}
        self._last = 0

    def allocate(self, request: SlotRequest) -> Slot | None:
        self._last += 1
        width = self.config.head_dim
        nothing = np.zeros((0, self.config.num_key_value_heads, width), np.float32)
        self._slots[self._last] = [(nothing, nothing)] * self.config.num_hidden_layers
        return Slot(self._last)

    def release(self, slot: int) -> None:
        del self._slots[slot]

    def step(self, rows: Sequence[StepRow]) -> list[NDArray[np.float32] | None]:
        return [self._row(row) for row in rows]

    def hidden(self, row: StepRow) -> Array:
        """float32[n, H]: the last layer's output at the row's positions, normalised."""
        x = self.weights["model.embed_tokens.weight"][list(row.ids)]
        for index in range(self.config.num_hidden_layers):
            layer = f"model.layers.{index}."
            x = x + self._attend(self._norm(x, layer + "input_layernorm"), layer + "self_attn.", index, row)
            hidden = self._norm(x, layer + "post_attention_layernorm")
            gate = hidden @ self.weights[layer + "mlp.gate_proj.weight"].T
            up = hidden @ self.weights[layer + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weights[layer + "mlp.down_proj.weight"].T
        return self._norm(x, "model.norm")

    def _row(self, row: StepRow) -> Array | None:
        hidden = self.hidden(row)
        if row.logits == "none":
            return None
        chosen = hidden[-1:] if row.logits == "last" else hidden[list(row.offsets)]
        logits = self.logits(chosen)
        if row.candidates is not None:
            logits = logits[:, row.candidates.ids]
        return logits[0] if row.logits == "last" else logits

    def logits(self, hidden: Array) -> Array:
        """float32[n, V] of :meth:`hidden`."""
        return hidden @ self.weights["model.embed_tokens.weight"].T

    def _attend(self, x: Array, prefix: str, index: int, row: StepRow) -> Array:
        config = self.config
        width, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        q, k, v = (
            (x @ self.weights[f"{prefix}{name}_proj.weight"].T).reshape(len(x), -1, width) for name in ("q", "k", "v")
        )
        positions = np.arange(row.start, row.start + len(x))
        q = self._rotate(self._norm(q, prefix + "q_norm"), positions)
        k = self._rotate(self._norm(k, prefix + "k_norm"), positions)
        keys, values = (np.concatenate(pair) for pair in zip(self._slots[row.slot][index], (k, v), strict=True))
        self._slots[row.slot][index] = (keys, values)
        keys, values = (np.repeat(each, groups, axis=1) for each in (keys, values))
        scores = np.einsum("qhd,khd->hqk", q, keys) / np.float32(np.sqrt(width))
        scores[:, np.arange(len(keys))[None] > positions[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, values).reshape(len(x), -1)
        return mixed @ self.weights[f"{prefix}o_proj.weight"].T

    def _norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(self.config.rms_norm_eps))
        return (x / scale * self.weights[name + ".weight"]).astype(np.float32)

    def _rotate(self, x: Array, positions: NDArray[np.int64]) -> Array:
        half = self.config.head_dim // 2
        frequencies = 1.0 / self.config.rope_theta ** (np.arange(half) / half)
        angles = (positions[:, None] * frequencies)[:, None]
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def read_safetensors(path: Path) -> dict[str, Array]:
    """bfloat16 and float32 tensors as float32."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        raw = data[start:end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, "<f4")
        tensors[name] = values.reshape(entry["shape"])
    return tensors
