"""K-quants: llama.cpp's own quantiser, in a process of its own.

The call cannot be interrupted, and llama.cpp ends its process at what it did not expect; a child can be ended at
Ctrl-C, and dies alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from gpa_codecs.errors import BackendError
from gpa_engines.backends.llama_cpp.gguf_model import FILE_TYPES

K_TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K")

_CHILD = Path(__file__).with_name("llama_quantize.py")
# llama.cpp's line for each tensor: "[   1/ 311]  token_embd.weight - [...], type = bf16, converting to q6_K .."
_TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)")


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed; it is not imported."""
    return find_spec("llama_cpp") is not None


def require_llama_cpp(what: str) -> None:
    """Raise BackendError where llama-cpp-python is not installed, saying how to get it."""
    if not has_llama_cpp():
        raise BackendError(
            f"{what} is made by llama.cpp, and llama-cpp-python is not installed: pip install 'gpa-engines[llama-cpp]' "
            "(--outtype f32, f16, bf16 and q8_0 do without)"
        )


def quantize(
    whole: Path, path: Path, file_type: str, progress: Callable[[str, int, int], None], log: Callable[[str], None]
) -> None:
    """Make `path` from the GGUF file `whole`, as one of K_TYPES.

    progress: told each tensor's name, its number and how many there are. log: told llama.cpp's lines. Raises
    BackendError with llama.cpp's last words if it fails.
    """
    number = next(number for number, name in FILE_TYPES.items() if name == file_type)
    command = [sys.executable, str(_CHILD), str(whole), str(path), str(number), str(os.cpu_count() or 1)]
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                lines.append(line.rstrip())
                log(lines[-1])
                if match := _TENSOR.match(line.strip()):
                    progress(match[3], int(match[1]), int(match[2]))
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        words = "; ".join([line for line in lines if line.strip()][-3:]) or "it said nothing"
        raise BackendError(f"llama.cpp could not make {file_type} (exit status {child.returncode}): {words}")
