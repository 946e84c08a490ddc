"""Fixtures of the llama.cpp engine's tests: GGUF files of the tiny checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def gguf_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full, speech and text files of the tiny checkpoint in F32, F16 and Q8_0; tests must not change it."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    pytest.importorskip("gguf", reason="needs gguf to convert")
    folder = tmp_path_factory.mktemp("gguf")
    for kind in ("f32", "f16", "q8_0"):
        command = [sys.executable, str(ROOT / "tools/convert/to_gguf.py"), str(tiny_checkpoint)]
        command += ["--outfile", str(folder), "--outtype", kind, "--vocab", "all", "--model-name", "tiny"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def prompts(goldens: dict) -> list[dict]:
    """The goldens' prompts with the reference's answers."""
    return goldens["prompts"]
