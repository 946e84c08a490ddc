"""Fixtures that many tests share: the ground truth in tests/data."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"


def pytest_configure() -> None:
    """Let Ctrl-C reach the processes that tests start: what a shell runs in the background ignores it, children too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def audio_dir() -> Path:
    """The recorded clips."""
    return DATA / "audio"


@pytest.fixture(scope="session")
def goldens() -> dict[str, Any]:
    """tests/data/goldens/tiny.json."""
    return json.loads((DATA / "goldens" / "tiny.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_arrays() -> Callable[[str], dict[str, np.ndarray]]:
    """Arrays of one golden file: golden_arrays("en_male_16k") reads tiny_en_male_16k.npz."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(DATA / "goldens" / f"tiny_{name}.npz") as arrays:
            return dict(arrays)

    return read


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's tiny checkpoint, unpacked; tests must not change it (see `tiny_checkpoint_copy`)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with tarfile.open(DATA / "tiny_checkpoint.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "tinyv"


@pytest.fixture
def tiny_checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def onnx_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tools/convert/to_onnx.py makes of the tiny checkpoint's codec, in every precision; tests must not change it.

    Converted by the command as a user types it, which compares the result with the checkpoint in torch.
    """
    for package in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"the codec in ONNX needs {package}")
    out = tmp_path_factory.mktemp("onnx") / "out"
    script = DATA.parents[1] / "tools" / "convert" / "to_onnx.py"
    options = ("--what", "codec", "--precision", "fp16", "--precision", "int8", "--verify", "--verbose")
    command = [sys.executable, str(script), str(tiny_checkpoint), "--out", str(out), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(out)
    (out.parent / "stderr.txt").write_text(result.stderr, encoding="utf-8")
    return out
