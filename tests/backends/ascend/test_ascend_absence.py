"""What is missing for the Ascend engine is said with the remedy, also where torch_npu breaks `import torch`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpa_codecs.errors import BackendError
from gpa_engines import registry
from gpa_engines.backends.ascend import create_engine
from gpa_engines.backends.ascend.cards import parse_cards

NO_CANN = "libhccl.so: cannot open shared object file: No such file or directory"
"""As recorded of torch_npu without CANN."""

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
without_torch_npu = pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed here")


@without_torch_npu
def test_torch_npu_is_not_installed() -> None:
    message = r"needs torch_npu: pip install 'gpa-engines\[ascend\]'"
    with pytest.raises(BackendError, match=f"{message}, and Huawei's CANN beside it; CANN 8.5.0 goes with"):
        create_engine("anywhere")
    with pytest.raises(BackendError, match=message):
        registry.create_engine("ascend", "anywhere")


@needs_torch
@without_torch_npu
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            f"ImportError({NO_CANN!r})",
            "torch_npu is installed, but CANN is not, or not set up in this shell: libhccl.so cannot be opened; "
            "install CANN and its driver, then `source /usr/local/Ascend/ascend-toolkit/set_env.sh`",
        ),
        (
            "ImportError('undefined symbol: _ZN3c10')",
            "torch_npu cannot be imported (ImportError: undefined symbol: _ZN3c10); CANN 8.5.0 goes with torch and",
        ),
    ],
)
def test_torch_npu_that_cannot_be_imported(tmp_path: Path, failure: str, message: str) -> None:
    """Torch loads what declares itself its backend, and fails with it; the engine says what is wrong all the same."""
    plant_torch_npu(tmp_path, failure)
    plain = run_python(tmp_path, "import torch")
    assert "Failed to load the backend extension: torch_npu" in plain.stderr
    code = (
        "import os\n"
        "from gpa_codecs.errors import BackendError\n"
        "from gpa_engines.registry import create_engine\n"
        "try: create_engine('ascend', 'anywhere')\n"
        "except BackendError as error: print(error)\n"
        "print(os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD'))\n"
        "import torch; print(torch.ones(2).sum().item())\n"
    )
    found = run_python(tmp_path, code)
    assert found.returncode == 0, found.stderr
    said, setting, total = found.stdout.splitlines()
    assert said.startswith(message)
    assert (setting, total) == ("None", "2.0")


@needs_torch
@without_torch_npu
def test_parity_is_skipped_where_cann_is_missing(tmp_path: Path) -> None:
    plant_torch_npu(tmp_path, f"ImportError({NO_CANN!r})")
    command = f"from gpa_conformance.parity import main; raise SystemExit(main(['ascend', '--out', {str(tmp_path)!r}]))"
    found = run_python(tmp_path, command)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("skipped: torch_npu is installed, but CANN is not")


@without_torch_npu
def test_parity_imports_nothing_where_torch_npu_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from gpa_conformance.parity import main\n"
        f"assert main(['ascend', '--out', {str(tmp_path / 'out')!r}]) == 0\n"
        "print(sorted({'torch', 'torch_npu'} & set(sys.modules)))\n"
    )
    found = run_python(tmp_path, code)
    assert found.returncode == 0, found.stderr
    skipped, imported = found.stdout.splitlines()
    assert skipped == "skipped: backend 'ascend' needs torch_npu: pip install 'gpa-engines[ascend]'"
    assert imported == "[]"


@pytest.mark.parametrize("name", ["cuda:0", "cpu", "npu:", "npu:-1", "npu:one", "npu:٣", "NPU:0", ""])
def test_a_malformed_device_is_named(name: str) -> None:
    with pytest.raises(BackendError, match=f"device '{name}' is unknown; expected auto, npu or npu:N"):
        create_engine("anywhere", device=name)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("npu:0,npu:0", "devices names npu:0 twice"),
        ("npu,npu:0", "devices names npu:0 twice"),
        ("npu:0,cuda:1", "devices 'cuda:1' is unknown; expected npu:N, several of them as npu:0,npu:1"),
        ("", "devices '' is unknown"),
        ([], "devices is empty; expected at least one name"),
        ([0, 1], "devices 0 is unknown"),
    ],
)
def test_malformed_devices_are_named(devices: str | list[str], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        create_engine("anywhere", devices=devices)


def test_one_of_device_and_devices_is_given() -> None:
    with pytest.raises(BackendError, match="device is 'npu:0' and devices is 'npu:1'; give one of the two"):
        create_engine("anywhere", device="npu:0", devices="npu:1")


def test_cards_are_known_by_their_numbers() -> None:
    assert [parse_cards(name, None) for name in ("auto", "npu", "npu:0", "npu:12")] == [(0,), (0,), (0,), (12,)]
    assert parse_cards("auto", "npu:1, npu:0") == parse_cards("auto", ["npu:1", "npu:0"]) == (1, 0)


def plant_torch_npu(folder: Path, failure: str) -> None:
    """A torch_npu that fails when it is imported, declared to torch as the real one is."""
    package = folder / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text(f"def _autoload(): pass\nraise {failure}\n", encoding="utf-8")
    metadata = folder / "torch_npu-2.9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.9.0\n", encoding="utf-8")
    entry = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
    (metadata / "entry_points.txt").write_text(entry, encoding="utf-8")


def run_python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path])
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
