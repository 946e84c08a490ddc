"""Backends are found by name, and what is wrong with one is said together with the remedy."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gpa_codecs.errors import BackendError
from gpa_engines import registry


def test_importing_the_package_is_framework_free() -> None:
    code = "import gpa_engines, gpa_engines.registry, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    import gpa_engines

    for name in gpa_engines.__all__:
        assert getattr(gpa_engines, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = gpa_engines.Nothing


def test_all_backends_are_listed_with_their_state() -> None:
    states = {status.backend.name: status.state for status in registry.list_backends()}
    assert list(states) == ["torch", "llama-cpp", "mlx", "onnx", "vllm", "sglang", "remote", "ascend"]
    assert states["torch"] == "ready"


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"unknown backend 'tensorflow'; known backends: torch, llama-cpp"):
        registry.require_backend("tensorflow")


def test_a_planned_backend_says_so() -> None:
    planned = next(status for status in registry.list_backends() if status.state == "planned")
    with pytest.raises(BackendError, match=f"'{planned.backend.name}' is not part of this version .* available: torch"):
        registry.create_engine(planned.backend.name, "anywhere")


def test_a_missing_package_gives_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "torch" else real(name))
    with pytest.raises(BackendError, match=r"backend 'torch' needs torch: pip install 'gpa-engines\[torch\]'"):
        registry.create_engine("torch", "anywhere")
    (torch,) = [status for status in registry.list_backends() if status.backend.name == "torch"]
    assert (torch.state, torch.remedy) == ("missing", "pip install 'gpa-engines[torch]'")


def test_an_option_that_the_backend_lacks_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match=r"backend 'torch' has no option 'n_gpu_layers'; its options: .*dtype"):
        registry.create_engine("torch", tiny_checkpoint, n_gpu_layers=3)
    assert {"device", "dtype", "threads"} <= set(registry.backend_options("torch"))
