"""The bearer key of servers."""

from __future__ import annotations

import os
from pathlib import Path

from gpa_codecs.errors import BackendError
from gpa_engines.servers.environment import KEY_VARIABLE

KEY_REMEDY = f"set {KEY_VARIABLE} in the environment or name a file that holds it with key_file (--key-file)"


def read_key(key_file: str | Path | None) -> str | None:
    """The bearer key of a file or of the environment; None for none. Raises BackendError for a file without one."""
    if key_file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = Path(key_file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise BackendError(f"key_file {key_file}: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    if not key:
        raise BackendError(f"key_file {key_file} is empty; {KEY_REMEDY}")
    return key
