"""`--option` of gpa-bench's commands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from gpa_engines.engine_options import parse_options

_FLAGS = {name: f"--{name}" for name in ("dtype", "device", "threads")}


def options_of_one(pairs: Sequence[str]) -> dict[str, Any]:
    """Of the one backend that a command measures. Raises GpaError as `parse_options`."""
    return parse_options(pairs, _FLAGS)


def options_by_backend(pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`[backend:]key=value`: by backend, with "" for what holds for all of them. Raises GpaError as `parse_options`."""
    grouped: defaultdict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        head, separator, value = pair.partition("=")
        backend, _, key = head.rpartition(":")
        grouped[backend].append(f"{key}{separator}{value}")
    return {backend: options_of_one(own) for backend, own in grouped.items()}
