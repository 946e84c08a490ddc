"""Folders that the MLX tests load: the tiny checkpoint converted, and copies of it that are whole but different."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GROUP_SIZE = 32
"""The largest that divides the tiny checkpoint's rows."""


@pytest.fixture(scope="session")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """quantized(8): the tiny checkpoint in that many bits."""
    pytest.importorskip("mlx.core", reason="needs mlx")
    from tools.convert.mlx_conversion.plan import make_plan
    from tools.convert.mlx_conversion.writing import write_plan

    parent = tmp_path_factory.mktemp("quantized")

    def convert(bits: int) -> Path:
        out = parent / f"{bits}bit"
        if not out.exists():
            plan = make_plan(tiny_checkpoint, bits, GROUP_SIZE, None)
            write_plan(plan, out, lambda what, done, total: None, lambda folder: None)
        return out

    return convert


@pytest.fixture
def quantized_copy(quantized: Callable[[int], Path], tmp_path: Path) -> Path:
    """The 8-bit folder, to be damaged."""
    return Path(shutil.copytree(quantized(8), tmp_path / "quantized"))


@pytest.fixture(scope="session")
def untied_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a head of its own: the embedding's rows in reverse."""
    mx = pytest.importorskip("mlx.core", reason="needs mlx")
    folder = tmp_path_factory.mktemp("untied") / "checkpoint"
    folder.mkdir()
    tensors = mx.load(str(tiny_checkpoint / "model.safetensors"))
    tensors["lm_head.weight"] = mx.contiguous(tensors["model.embed_tokens.weight"][::-1])
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    shutil.copy(tiny_checkpoint / "tokenizer.json", folder)
    config = json.loads((tiny_checkpoint / "config.json").read_text(encoding="utf-8"))
    write_config(folder, config | {"tie_word_embeddings": False})
    return folder


def write_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def change_config(folder: Path, **changes: Any) -> None:
    """Replace keys of a config.json; None removes one."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    write_config(folder, {key: value for key, value in values.items() if value is not None})
