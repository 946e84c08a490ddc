"""Running to_gguf.py as its users do: in a process of its own, in which torch and transformers cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "convert" / "to_gguf.py"

NEVER_NEEDED = ("torch", "transformers")

# As `python SCRIPT ...`, after the imports of the packages that the first argument names have been barred.
_START = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))
del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(*arguments: object, without: str = "") -> list[str]:
    """without: another package that is not to be had."""
    return [sys.executable, "-c", _START, ",".join((*NEVER_NEEDED, without)), str(SCRIPT), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "codecs", ROOT / "conformance")))}


def to_gguf(
    *arguments: object, without: str = "", preexec: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Exit status and text output of one call. preexec: called in the new process first."""
    return subprocess.run(
        command(*arguments, without=without),
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=preexec,
        timeout=240,
        check=False,
    )
