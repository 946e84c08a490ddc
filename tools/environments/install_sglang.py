"""Install SGLang into the virtual environment whose Python runs this: `python tools/environments/install_sglang.py`.

Where SGLang is there already, nothing is done. Where there is an NVIDIA GPU, it is `pip install sglang`. Elsewhere it
is a recipe for a CPU, for which SGLang has no packages: its metadata asks for the CUDA stack, and its kernels for CPUs
are on no package index. So it is installed without its dependencies, then those that a CPU can use, and what cannot be
had is stood in for:

- `sgl_kernel`, SGLang's kernels: names that can be imported, and raise when they are called. With
  `attention_backend=torch_native` SGLang computes with torch's own operations and calls none of them.
- torchvision's native operations `nms` and `qnms`: declared, without code. They are for pictures.

What runs then is SGLang's own scheduler, cache, sampler, model code and server; what is not tested are its kernels, and
nothing can be said of its speed. Verified with SGLang 0.5.23, torch 2.13.0 and Python 3.11.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

TORCH = "torch==2.13.0"

HERE = Path(__file__).parent

SGL_KERNEL = '''"""A stand-in for SGLang's kernels, which no package has for CPUs: names to import, not to call."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_, **__):
        raise NotImplementedError(f"sgl_kernel.{name}: this is a stand-in without kernels")

    return missing
'''

TORCHVISION_OPS = '''"""A stand-in for torchvision's native operations: declared, without code."""

import torch

_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''


def main() -> int:
    """Install what is missing; the exit status of what failed, else 0."""
    if find_spec("sglang") is not None:
        print("SGLang is installed already")
        return 0
    if sys.prefix == sys.base_prefix:
        print(
            "error: this is no virtual environment; make one for SGLang and run this with its Python", file=sys.stderr
        )
        return 2
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], check=False).returncode == 0:
        return _pip("sglang>=0.5.23")
    return _install_for_cpu()


def _install_for_cpu() -> int:
    status = _pip(TORCH, "--requirement", str(HERE / "sglang_cpu.txt")) or _pip(
        "--no-deps", "--requirement", str(HERE / "sglang_cpu_no_deps.txt")
    )
    if not status:
        _write_stand_ins(Path(sysconfig.get_paths()["purelib"]))
        print("SGLang is installed for the CPU, with stand-ins for what only GPUs have: use it with device=cpu")
    return status


def _pip(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=False).returncode


def _write_stand_ins(packages: Path) -> None:
    kernel = packages / "sgl_kernel"
    kernel.mkdir(exist_ok=True)
    (kernel / "__init__.py").write_text(SGL_KERNEL, encoding="utf-8")
    (packages / "torchvision_ops_stand_in.py").write_text(TORCHVISION_OPS, encoding="utf-8")
    vision = packages / "torchvision" / "__init__.py"
    text = vision.read_text(encoding="utf-8")
    wanted = "import torchvision_ops_stand_in"
    if wanted not in text:
        # Before torchvision itself registers what it knows of its operations.
        vision.write_text(text.replace("import torch\n", f"import torch\n{wanted}\n", 1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
