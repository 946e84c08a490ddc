"""Reading a model's configuration file with errors that name the file, the key and the value."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gpa_codecs.errors import CheckpointError

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """Keys and values of a JSON or YAML file, or of one section of it.

    source: the file, and the section where there is one, for messages.
    Every getter raises CheckpointError for a key that is missing or whose value is of another kind.
    """

    source: str
    values: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> ConfigFile:
        """Read `path` (YAML for .yaml and .yml, else JSON)."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            values = yaml.safe_load(text) if path.suffix in {".yaml", ".yml"} else json.loads(text)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}; download the checkpoint again") from error
        except (ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"{path} cannot be parsed: {error}; download the file again") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected keys and values, found {type(values).__name__}")
        return cls(str(path), values)

    def section(self, name: str) -> ConfigFile:
        values = self._get(name)
        if not isinstance(values, dict):
            raise self._wrong(name, "a section of keys and values")
        return ConfigFile(f"{self.source}: {name}", values)

    def integer(self, name: str) -> int:
        """An integer of at least 1."""
        value = self._get(name)
        if type(value) is not int or value < 1:
            raise self._wrong(name, "a positive integer")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A non-empty list of integers of at least 1."""
        value = self._get(name)
        if not isinstance(value, list) or not value or any(type(item) is not int or item < 1 for item in value):
            raise self._wrong(name, "a list of positive integers")
        return tuple(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number of at least 0; `default` where the key is missing or null."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self._wrong(name, "a number of at least 0")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._get(name)
        if type(value) is not bool:
            raise self._wrong(name, "true or false")
        return value

    def require(self, name: str, expected: Any, *, default: Any = _ABSENT) -> None:
        """Refuse any value but the one that is implemented; a missing key counts as `default` where one is given."""
        value = self._get(name) if default is _ABSENT else self.values.get(name, default)
        if value != expected:
            raise self._wrong(name, f"{json.dumps(expected)}, the only value that is supported")

    def _get(self, name: str) -> Any:
        if name not in self.values:
            raise CheckpointError(f"{self.source}: {name} is missing; this is not the released configuration")
        return self.values[name]

    def _wrong(self, name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {name} is {self.values.get(name)!r}; expected {expected}")
