"""Options of an engine on a command line: `--option KEY=VALUE`, for what has no option of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from gpa_codecs.errors import GpaError

_NO_FLAGS: Mapping[str, str] = MappingProxyType({})


def parse_options(pairs: Sequence[str], flags: Mapping[str, str] = _NO_FLAGS) -> dict[str, Any]:
    """`key=value` of every --option; a value that is JSON (a number, true, null) is read as such.

    flags: option -> the command line's own flag for it. Raises GpaError, also for one of these and for a server's key,
    which everybody could read in the list of processes.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise GpaError(f"--option {pair}: expected key=value, for example --option max_batch=8")
        if key in flags:
            raise GpaError(f"--option {key}=...: {flags[key]} is the option for it")
        if key == "key":
            instead = flags.get("key_file", "--option key_file=FILE")
            raise GpaError(f"--option key=...: a key on a command line is seen by everybody; use {instead}")
        if key in options:
            raise GpaError(f"--option {key} is given twice: {options[key]!r} and {value!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
