"""How a mistake in one number of config.json would move the reference's logits: what `families.suspects` looks for."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_conformance.baseline.reading import BaselineError
from gpa_conformance.cases import Case
from gpa_conformance.prompts import spread_ids
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.engine import Engine

OpenEngine = Callable[[Path], Engine | Awaitable[Engine]]
"""Opens the reference engine on a folder of language model files."""

LOGITS_BYTES = 2**28
LEAST_PROMPTS = 4
"""As many prompts as the case asks for, but of no more bytes of logits unless they are so few: a large model's hidden
state averages its rounding over more dimensions and needs fewer."""


def unchanged(checkpoint: Checkpoint, change: Mapping[str, float]) -> str | None:
    """Why a change is none for this checkpoint, in words."""
    for name, value in change.items():
        if getattr(checkpoint.config, name) == value:
            return f"the checkpoint's own {name} is {value:g}"
    return None


def describe(checkpoint: Checkpoint, change: Mapping[str, float]) -> str:
    """ "an rms_norm_eps of 1e-05 instead of 1e-06"."""
    return " and ".join(
        f"{name} {value:g} instead of {getattr(checkpoint.config, name):g}" for name, value in change.items()
    )


async def mistake_arrays(
    checkpoint: Checkpoint, engine: Engine, open_engine: OpenEngine, case: Case
) -> dict[str, NDArray[Any]]:
    """ids int64[n, L]; columns int64[S], evenly spread ids; logits and direction float32[n, L, S] at these columns."""
    vocab_size, length = engine.info.vocab_size, case.spec["length"]
    count = min(max(LOGITS_BYTES // (length * vocab_size * 4), LEAST_PROMPTS), case.spec["most_prompts"])
    ids = np.array([spread_ids(length, case.spec["seed"] + number, vocab_size) for number in range(count)], np.int64)
    kept = min(vocab_size, 2 * checkpoint.config.hidden_size)
    columns = (np.arange(kept) * 2 + 1) * vocab_size // (2 * kept)
    logits = await _logits(engine, ids, columns)
    with tempfile.TemporaryDirectory(prefix="gpa-conformance-") as folder:
        _write_variant(checkpoint, case.spec["change"], Path(folder))
        opened = open_engine(Path(folder))
        mistaken = await opened if inspect.isawaitable(opened) else opened
        try:
            direction = await _logits(mistaken, ids, columns) - logits
        finally:
            await mistaken.close()
    if not np.isfinite(direction).all() or not np.any(direction):
        raise BaselineError(f"{case.id}: {describe(checkpoint, case.spec['change'])} moves no logit, or gives NaN")
    return {"ids": ids, "columns": columns, "logits": logits, "direction": direction}


async def _logits(engine: Engine, prompts: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.stack([(await engine.logits(ids.tolist()))[:, columns] for ids in prompts])


def _write_variant(checkpoint: Checkpoint, change: Mapping[str, float], folder: Path) -> None:
    """The language model's files under their names, config.json with other numbers."""
    config = json.loads(checkpoint.config_file.read_text(encoding="utf-8"))
    for name, value in change.items():
        places = [part for part in (config, config.get("rope_parameters") or {}) if name in part]
        for part in places or [config]:
            part[name] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in checkpoint.root.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
