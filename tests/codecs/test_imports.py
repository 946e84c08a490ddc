"""Modules without a framework stay without one."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "gpa_codecs.audio",
        "gpa_codecs.codec",
        "gpa_codecs.network_codec",
        "gpa_codecs.onnx_codec",
        "gpa_codecs.onnx_folder",
        "gpa_codecs.prompts",
        "gpa_codecs.silences",
        "gpa_codecs.text_splitting",
        "gpa_codecs.vocabulary",
        "gpa_engines.examples",
        "gpa_engines.sampling",
    ],
)
def test_no_framework_is_imported(module: str) -> None:
    frameworks = {"torch", "transformers", "huggingface_hub", "onnxruntime"}
    code = f"import sys, {module}; print(*sorted({frameworks} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
