"""torch_npu: imported when it is needed, and what is wrong where it cannot be.

An installed torch_npu is loaded by `import torch` itself, which fails with it where CANN is missing. So torch is
imported here without that, and torch_npu by name afterwards: then the error is ours to explain.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from gpa_codecs.errors import BackendError

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

PAIRS = "CANN 8.5.0 goes with torch and torch_npu 2.6 to 2.10, both of the same version"
"""From torch_npu's own table; docs/ascend.md has more."""

_MISSING_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")


def load_torch_npu() -> ModuleType:
    """The module torch_npu, imported. Raises BackendError saying whether it, CANN or a fitting pair is missing.

    Kernels that exist are used as they are, and none is compiled for a shape: requests of every length come.
    """
    if find_spec("torch_npu") is None:
        raise BackendError(
            f"backend 'ascend' needs torch_npu: pip install 'gpa-engines[ascend]', and Huawei's CANN beside it; {PAIRS}"
        )
    try:
        with _without_autoload():
            import_module("torch")
            torch_npu = import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(_explain(error)) from error
    if hasattr(torch_npu.npu, "set_compile_mode"):
        torch_npu.npu.set_compile_mode(jit_compile=False)
    return torch_npu


def _explain(error: BaseException) -> str:
    missing = _MISSING_LIBRARY.search(str(error))
    if missing is not None:
        return (
            f"torch_npu is installed, but CANN is not, or not set up in this shell: {missing[1]} cannot be opened; "
            "install CANN and its driver, then `source /usr/local/Ascend/ascend-toolkit/set_env.sh` (or where you put "
            f"it) before you start; {PAIRS}"
        )
    return f"torch_npu cannot be imported ({type(error).__name__}: {error}); {PAIRS}"


@contextmanager
def _without_autoload() -> Iterator[None]:
    before = os.environ.get(AUTOLOAD)
    os.environ[AUTOLOAD] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[AUTOLOAD]
        else:
            os.environ[AUTOLOAD] = before
