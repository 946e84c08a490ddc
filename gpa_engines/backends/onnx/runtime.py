"""ONNX Runtime: execution providers, and sessions whose runs can be broken off."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, CheckpointError

try:
    import onnxruntime as ort
except ImportError as error:
    raise BackendError(f"backend 'onnx' needs onnxruntime: pip install 'gpa-engines[onnx]' ({error})") from error

CPU = "CPUExecutionProvider"

# ONNX Runtime writes what it also raises to stderr; only what ends the process is left there.
_FATAL = 4


def choose_provider(device: str) -> str:
    """The execution provider for "auto", "cpu", or a provider's name with or without "ExecutionProvider".

    Raises BackendError for one that this ONNX Runtime does not have.
    """
    if device == "auto":
        return CPU
    available: list[str] = ort.get_available_providers()
    for provider in available:
        if device.lower() in (provider.lower(), device_of(provider)):
            return provider
    raise BackendError(
        f"device {device!r} is not available: onnxruntime {ort.__version__} has "
        f"{', '.join(device_of(each) for each in available)}"
    )


def device_of(provider: str) -> str:
    """ "cpu" of "CPUExecutionProvider"."""
    return provider.removesuffix("ExecutionProvider").lower()


def has_int8_kernels() -> bool:
    """Whether this ONNX Runtime multiplies 8-bit weights as they are; versions before 1.25 expand them each time."""
    major, minor = (int(part) for part in ort.__version__.split(".")[:2])
    return (major, minor) >= (1, 25)


class Session:
    """A loaded graph. Arrays go in and come out without a copy on the CPU."""

    def __init__(self, path: Path, provider: str, threads: int | None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        # Shapes change with every step, so a planned memory layout would be planned anew each time.
        options.enable_mem_pattern = False
        if threads is not None:
            options.intra_op_num_threads = threads
        # 8-bit products: the kernel that multiplies 8-bit numbers. Its default expands the weights each time.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        # The threads of the body must not spin while those of the head work.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = [provider] if provider == CPU else [provider, CPU]
        try:
            self._session = ort.InferenceSession(path, options, providers=providers)
        except Exception as error:  # a class per status of ONNX Runtime, with no base of their own
            raise CheckpointError(f"{path} cannot be loaded by onnxruntime {ort.__version__}: {error}") from error
        self._outputs = [each.name for each in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Any], run: Run | None = None) -> list[NDArray[Any]]:
        """inputs: arrays, or what `wrap` made of them -> the outputs in the graph's order."""
        wrapped = {name: wrap(value) for name, value in inputs.items()}
        options = None if run is None else run.options
        return [each.numpy() for each in self._session.run_with_ort_values(self._outputs, wrapped, options)]


class Run:
    """A run that another thread may break off."""

    def __init__(self) -> None:
        self.options = ort.RunOptions()
        self.options.log_severity_level = _FATAL
        # What a long prompt took for its intermediate results is given back.
        self.options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def stop(self) -> None:
        """Let the run fail at its next operator."""
        self.options.terminate = True

    @property
    def stopped(self) -> bool:
        return self.options.terminate


def wrap(value: Any) -> Any:
    """An array as an ONNX Runtime value that shares its memory; such a value as it is."""
    if isinstance(value, ort.OrtValue):
        return value
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
