"""Options of an engine on a command line: `--option KEY=VALUE`, for what has no option of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gpa_codecs.errors import GpaError


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` of every --option; a value that is JSON (a number, true, null) is read as such. Raises GpaError."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise GpaError(f"--option {pair}: expected key=value, for example --option max_batch=8")
        if key in options:
            raise GpaError(f"--option {key} is given twice: {options[key]!r} and {value!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
