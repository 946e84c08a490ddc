"""Copies of a checkpoint's language model that differ from it as if an engine had misread it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def copy_language_model(checkpoint: Path, folder: Path) -> Path:
    """config.json and model.safetensors in a new folder."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(checkpoint / name, folder / name)
    return folder


def set_eps(folder: Path) -> None:
    """1e-5, the default of older models, instead of 1e-6."""
    _change_config(folder, rms_norm_eps=1e-5)


def set_theta(folder: Path) -> None:
    """1e4, the default of older models, instead of 1e6."""
    _change_config(folder, rope_theta=1e4)


def ignore_tying(folder: Path) -> None:
    """An output matrix of its own, freshly drawn."""

    def add_head(tensors: Tensors) -> None:
        table = tensors["model.embed_tokens.weight"]
        drawn = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)) * table.float().std()
        tensors["lm_head.weight"] = drawn.to(table.dtype)

    _change_weights(folder, add_head)
    _change_config(folder, tie_word_embeddings=False)


def swap_layer_norms(folder: Path) -> None:
    """The norm before attention and the one before the MLP."""
    _change_weights(folder, lambda tensors: _swap(tensors, "input_layernorm", "post_attention_layernorm"))


def swap_head_norms(folder: Path) -> None:
    """The norm of the queries and that of the keys."""
    _change_weights(folder, lambda tensors: _swap(tensors, "self_attn.q_norm", "self_attn.k_norm"))


def swap_gate_and_up(folder: Path) -> None:
    """The two inputs of the MLP."""
    _change_weights(folder, lambda tensors: _swap(tensors, "mlp.gate_proj", "mlp.up_proj"))


def swap_head_groups(folder: Path) -> None:
    """The key and value heads in reverse order: queries look at another group's."""

    def reverse(tensors: Tensors) -> None:
        config = json.loads((folder / "config.json").read_text())
        for name in [name for name in tensors if "k_proj" in name or "v_proj" in name]:
            heads = tensors[name].unflatten(0, (config["num_key_value_heads"], -1))
            tensors[name] = heads.flip(0).flatten(0, 1).contiguous()

    _change_weights(folder, reverse)


def forget_final_norm(folder: Path) -> None:
    """Ones instead of the last norm's weights."""
    _change_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(1.0))


def drop_last_layer(folder: Path) -> None:
    _change_config(folder, num_hidden_layers=json.loads((folder / "config.json").read_text())["num_hidden_layers"] - 1)


def _change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    assert not values.keys() - config.keys()
    file.write_text(json.dumps(config | values), encoding="utf-8")


def _change_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _swap(tensors: Tensors, one: str, other: str) -> None:
    for name in [name for name in tensors if f".{one}." in name]:
        partner = name.replace(f".{one}.", f".{other}.")
        tensors[name], tensors[partner] = tensors[partner], tensors[name]
