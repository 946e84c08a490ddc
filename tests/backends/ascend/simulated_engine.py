"""The Ascend engine on the simulated device, as a factory for `gpa-conformance --engine`."""

from __future__ import annotations

from pathlib import Path

from gpa_engines.engine import Engine
from gpa_engines.registry import create_engine
from tests.backends.ascend import simulated_npu


def create(model_dir: Path, *, device: str = "auto", dtype: str = "float32", attention: str = "sdpa") -> Engine:
    simulated_npu.install()
    return create_engine("ascend", model_dir, device=device, dtype=dtype, attention=attention)
