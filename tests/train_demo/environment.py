"""The environment of a process that imports what the tests import."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tools" / "train_demo"


def environment() -> dict[str, str]:
    """PYTHONPATH leads to this tree."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "codecs", ROOT / "conformance", RECIPE))),
    }
