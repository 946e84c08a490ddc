"""Checkpoints for the converters' tests: the tiny one, changed, or the language model alone in another geometry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Weights = dict[str, np.ndarray]


def change_config(folder: Path, **changes: Any) -> Path:
    """Replace keys of config.json; None removes a key."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
    return folder


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return folder


def write_language_model(folder: Path, tokenizer_of: Path, *, tied: bool = True, seed: int = 0, **sizes: int) -> Path:
    """A new folder with random float16 weights of these sizes (keys of config.json) and another's tokenizer."""
    folder.mkdir()
    shutil.copy(tokenizer_of / "tokenizer.json", folder)
    shutil.copy(tokenizer_of / "config.json", folder)
    change_config(folder, tie_word_embeddings=tied, layer_types=None, **sizes)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    random = np.random.default_rng(seed)
    weights = {
        name: (1 + random.normal(0, 0.1, shape) if len(shape) == 1 else random.normal(0, shape[1] ** -0.5, shape))
        for name, shape in _shapes(config).items()
    }
    save_file({name: each.astype(np.float16) for name, each in weights.items()}, folder / "model.safetensors")
    return folder


def float16_weights(folder: Path) -> Weights:
    """The tiny checkpoint's bfloat16 weights, which NumPy cannot name, as float16 arrays."""
    return {name: each.astype(np.float16) for name, each in float32_weights(folder).items()}


def float32_weights(folder: Path) -> Weights:
    """All weights of model.safetensors in float32."""
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    weights = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            raw = np.frombuffer(data[start:end], {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[entry["dtype"]])
            values = (raw.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else raw.astype(np.float32)
            weights[name] = values.reshape(entry["shape"])
    return weights


def save_weights(folder: Path, weights: Mapping[str, np.ndarray], name: str = "model.safetensors") -> Path:
    save_file({key: np.ascontiguousarray(each) for key, each in weights.items()}, folder / name)
    return folder


def shard(folder: Path, twice: str | None = None) -> Path:
    """Split model.safetensors in two with an index. twice: a tensor that both shards hold."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    index = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        held = {*half, *([twice] if twice else [])}
        save_weights(folder, {name: weights[name] for name in held}, file)
        index |= dict.fromkeys(half, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return folder


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            shapes[f"{layer}{name}.weight"] = (rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (hidden,)
        for name in ("q_norm", "k_norm"):
            shapes[f"{layer}self_attn.{name}.weight"] = (width,)
    return shapes
