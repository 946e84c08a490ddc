"""The engine made of the ONNX Runtime step model."""

from __future__ import annotations

from pathlib import Path

from gpa_codecs.errors import BackendError
from gpa_engines.backends.onnx.exported import ExportedLM
from gpa_engines.backends.onnx.model import OnnxStepModel
from gpa_engines.backends.onnx.runtime import CPU, choose_provider, device_of, has_int8_kernels
from gpa_engines.engine import EngineInfo
from gpa_engines.step_engine import CAPABILITIES, INVARIANT, StepEngine


def build_engine(
    model_dir: str | Path,
    device: str,
    dtype: str,
    threads: int | None,
    max_tokens_in_flight: int,
    max_batch: int,
    prefill_chunk: int,
) -> StepEngine:
    """What :func:`gpa_engines.backends.onnx.create_engine` does, once ONNX Runtime may be imported."""
    sizes = {"max_tokens_in_flight": max_tokens_in_flight, "max_batch": max_batch, "prefill_chunk": prefill_chunk}
    for name, value in (sizes | ({} if threads is None else {"threads": threads})).items():
        if value < 1:
            raise BackendError(f"{name} is {value}; expected at least 1")
    provider = choose_provider(device)
    exported = ExportedLM.open(model_dir, dtype)
    model = OnnxStepModel(
        exported, provider=provider, threads=threads, max_tokens=max_tokens_in_flight, max_batch=max_batch
    )
    info = EngineInfo(
        "onnx",
        device_of(provider),
        exported.dtype,
        model.vocab_size,
        model.max_context,
        INVARIANT if provider == CPU else CAPABILITIES,
        note=_note(provider, exported.dtype),
        tokenizer_sha256=exported.tokenizer_sha256,
    )
    return StepEngine(info, model, prefill_chunk=prefill_chunk)


def _note(provider: str, dtype: str) -> str:
    """What a user should know of this combination, or ""."""
    if provider != CPU:
        return "keys and values in host memory; this provider is not verified"
    if dtype == "int8" and not has_int8_kernels():
        return "this onnxruntime expands 8-bit weights in every step; 1.25 and later are eight times faster"
    return ""
