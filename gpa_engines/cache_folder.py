"""Where checkpoints that this package makes or brings are kept for the user."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """`$GPA_ENGINES_CACHE`, or gpa-engines in the platform's cache folder (XDG, ~/Library/Caches, LOCALAPPDATA)."""
    if chosen := os.environ.get("GPA_ENGINES_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "gpa-engines"
