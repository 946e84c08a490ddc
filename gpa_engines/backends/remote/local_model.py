"""What the local folder knows of the model that the servers are to have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpa_codecs.errors import CheckpointError
from gpa_codecs.weights import weight_files
from gpa_engines.fingerprint import FILE, Fingerprint
from gpa_engines.lm_config import LMConfig

NAMES = 8
"""Added tokens whose names are compared with a server's tokenizer; the first and the last are among them."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """config: of config.json. end_ids: that the model's own files name. names: of some added tokens, by id."""

    config: LMConfig
    end_ids: frozenset[int]
    names: Mapping[int, str]

    @classmethod
    def read(cls, folder: Path) -> LocalModel:
        """Raises CheckpointError for a folder without config.json, and for damaged files."""
        config = LMConfig.from_file(folder / "config.json")
        added = _added_tokens(folder / "tokenizer.json")
        end_ids = {token for name in ("config.json", "generation_config.json") for token in _end_ids(folder / name)}
        end_token = _read(folder / "tokenizer_config.json").get("eos_token")
        if isinstance(end_token, dict):
            end_token = end_token.get("content")
        end_ids |= {token for token, name in added.items() if name == end_token}
        ids = sorted(token for token in added if token < config.vocab_size)
        places = {round(step * (len(ids) - 1) / (NAMES - 1)) for step in range(NAMES)} if ids else set()
        return cls(config, frozenset(end_ids), {ids[place]: added[ids[place]] for place in sorted(places)})


def expected_fingerprint(folder: Path, expect: str) -> Fingerprint | None:
    """What the servers are compared with; None for nothing but each other.

    expect: "none", "auto" or a file; see :func:`gpa_engines.backends.remote.create_engine`. Raises CheckpointError.
    """
    if expect == "none":
        return None
    if expect != "auto":
        return Fingerprint.read(Path(expect))
    if (folder / FILE).is_file():
        return Fingerprint.read(folder / FILE)
    if not _has_weights(folder) or find_spec("torch") is None:
        return None
    return Fingerprint.of_model("torch", folder, {"device": "cpu", "dtype": "float32"})


def _has_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except CheckpointError:
        return False


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises CheckpointError for one that is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download the file again") from error
    return values if isinstance(values, dict) else {}


def _end_ids(path: Path) -> set[int]:
    value = _read(path).get("eos_token_id")
    return {token for token in (value if isinstance(value, list) else [value]) if type(token) is int}


def _added_tokens(path: Path) -> dict[int, str]:
    tokens = _read(path).get("added_tokens")
    try:
        return {int(each["id"]): str(each["content"]) for each in tokens or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: added_tokens cannot be read ({error!r}); download the file again") from error
