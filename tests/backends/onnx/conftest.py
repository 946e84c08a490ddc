"""What the tests of the ONNX Runtime backend share: the tiny checkpoint's language model, exported once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported_dir(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with all precisions in lm/; tests must not change it (see `exported_copy`)."""
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnx", reason="the export needs onnx")
    from tools.convert.onnx_conversion.lm import export_lm

    folder = tmp_path_factory.mktemp("exported")
    export_lm(tiny_checkpoint, folder, ["fp32", "fp16", "int8"], lambda what, done, total: None)
    return folder


@pytest.fixture
def exported_copy(exported_dir: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder that a test may damage."""
    return Path(shutil.copytree(exported_dir, tmp_path / "exported"))
