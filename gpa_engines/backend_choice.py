"""`--backend auto`: the best backend that is installed for the formats that a model is there in, and why it is."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpa_codecs.errors import BackendError, CheckpointError
from gpa_codecs.weights import weight_files
from gpa_engines.backends.llama_cpp.gguf_file import gguf_files
from gpa_engines.checkpoint.mlx_quantization import KEY
from gpa_engines.registry import BACKENDS, backend_status, require_backend

AUTO = "auto"
"""In place of a backend's name: the best one for the model and the machine."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend's name and, in words, why it was chosen."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"backend {self.name}: {self.reason}"


@dataclass(frozen=True, slots=True)
class _Rule:
    """A backend that is chosen where its format is there, it is installed, and `fits` (asked last) says so."""

    backend: str
    format: Callable[[Path], bool]
    reason: str
    fits: Callable[[], bool] = lambda: True


def choose_backend(path: Path) -> Choice:
    """The backend for a model's folder or .gguf file.

    In this order: torch on a CUDA device, MLX on Apple silicon, llama.cpp, torch, ONNX Runtime, MLX on other machines;
    of these the first that is installed and whose format the model is there in. Raises BackendError where there is
    none, saying what to install.
    """
    if path.is_file():
        return Choice(require_backend("llama-cpp").name, f"{path.name} is a GGUF file")
    wanted = dict.fromkeys(rule.backend for rule in RULES if rule.format(path))
    if not wanted:
        # An empty or damaged folder: the checkpoint's own checks say what is missing.
        return Choice(require_backend("torch").name, "the folder holds no model in another format")
    ready = {name for name in wanted if backend_status(BACKENDS[name]).state == "ready"}
    for rule in RULES:
        if rule.backend in ready and rule.format(path) and rule.fits():
            return Choice(rule.backend, rule.reason)
    raise BackendError(
        f"no backend that can run {path} is installed; install one of: "
        + "; ".join(f"{name} ({backend_status(BACKENDS[name]).remedy})" for name in wanted)
    )


def _has_gguf(folder: Path) -> bool:
    return any(gguf_files(folder))


def _has_weights(folder: Path) -> bool:
    """Weights as released, which torch and MLX read."""
    try:
        return bool(weight_files(folder)) and not is_quantized(folder)
    except CheckpointError:
        return False


def _has_mlx_weights(folder: Path) -> bool:
    return _has_weights(folder) or is_quantized(folder)


def is_quantized(folder: Path) -> bool:
    """Whether the folder was written by tools/convert/to_mlx.py, or by mlx-lm, with quantised weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get(KEY) is not None


def _has_onnx(folder: Path) -> bool:
    return any((place / "lm" / "manifest.json").is_file() for place in (folder, folder / "onnx"))


def _on_cuda() -> bool:
    """Whether torch sees a CUDA device; torch is imported only where the machine seems to have one."""
    devices = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
    if not (any(device.exists() for device in devices) or shutil.which("nvidia-smi")):
        return False
    import torch

    return torch.cuda.is_available()


def _on_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


RULES = (
    _Rule("torch", _has_weights, "it is installed and there is a CUDA device", _on_cuda),
    _Rule("mlx", _has_mlx_weights, "it is installed and this is Apple silicon", _on_apple_silicon),
    _Rule("llama-cpp", _has_gguf, "it is installed, there is a GGUF file, and it is the fastest on a CPU"),
    _Rule("torch", _has_weights, "it is installed and reads the checkpoint as it is"),
    _Rule("onnx", _has_onnx, "it is installed and the model was exported for it"),
    _Rule("mlx", _has_mlx_weights, "it is installed and reads this model"),
)
