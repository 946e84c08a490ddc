"""Fixtures of the llama.cpp engine's tests: GGUF files of the tiny checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert.gguf_checkpoints import write_language_model

ROOT = Path(__file__).parents[3]


def _convert(model: Path, *options: object) -> None:
    command = [sys.executable, str(ROOT / "tools/convert/to_gguf.py"), str(model), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def gguf_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full, speech and text files of the tiny checkpoint in F32, F16 and Q8_0; tests must not change it."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    pytest.importorskip("gguf", reason="needs gguf to convert")
    folder = tmp_path_factory.mktemp("gguf")
    for kind in ("f32", "f16", "q8_0"):
        _convert(tiny_checkpoint, "--outfile", folder, "--outtype", kind, "--vocab", "all", "--model-name", "tiny")
    return folder


@pytest.fixture(scope="session")
def k_quant(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Q4_K_M file of random weights whose rows divide."""
    pytest.importorskip("llama_cpp", reason="K-quants are made by llama-cpp-python")
    folder = tmp_path_factory.mktemp("k-quant") / "wide"
    model = write_language_model(folder, tiny_checkpoint, hidden_size=256, intermediate_size=512, head_dim=64)
    _convert(model, "--quantize", "Q4_K_M")
    return model / "wide-Q4_K_M.gguf"


@pytest.fixture
def prompts(goldens: dict) -> list[dict]:
    """The goldens' prompts with the reference's answers."""
    return goldens["prompts"]
