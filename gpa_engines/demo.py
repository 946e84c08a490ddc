"""The demo checkpoint: a small trained one that comes with the package and knows spoken digits."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gpa_codecs.errors import CheckpointError
from gpa_engines.cache_folder import cache_folder

DEMO = "demo"
"""Its name where a model is asked for."""

GATES_FILE = "gates.json"
"""What it can do, as the recipe that trained it measured it (tools/train_demo)."""

_PACKAGED = Path(__file__).parent / "assets" / DEMO
_IDENTITY = ("training.json", GATES_FILE, "speech_domain.json")

_MEASURES = {"stt": ("stt",), "tts-a": ("tts-a greedy", "tts-a sampled"), "vc": ("vc greedy", "vc sampled")}


def demo_checkpoint() -> Path:
    """The folder of the demo checkpoint in the user's cache; copied there on first use, so that conversions of it have
    a place. What is missing of an earlier copy is copied again; what else lies there is left alone.

    Raises CheckpointError.
    """
    identity = hashlib.sha256()
    try:
        for name in _IDENTITY:
            identity.update((_PACKAGED / name).read_bytes())
        folder = cache_folder() / f"{DEMO}-{identity.hexdigest()[:12]}"
        packaged = {folder / path.relative_to(_PACKAGED): path for path in _PACKAGED.rglob("*") if path.is_file()}
        missing = {target: path for target, path in packaged.items() if not _is_copied(target, path)}
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            # Elsewhere first: others may copy at the same time, and read.
            with tempfile.TemporaryDirectory(prefix=f".{DEMO}.", dir=folder.parent) as temporary:
                for target, path in missing.items():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy := Path(temporary) / target.name)
                    copy.replace(target)
    except OSError as error:
        raise CheckpointError(f"the demo checkpoint cannot be copied to the cache: {error}") from error
    return folder


def _is_copied(target: Path, path: Path) -> bool:
    return target.is_file() and target.stat().st_size == path.stat().st_size


def demo_claims() -> list[str]:
    """A line for each task: how well the demo checkpoint does it, from its measured file; or that it does not."""
    gates: dict[str, Any] = json.loads((_PACKAGED / GATES_FILE).read_text(encoding="utf-8"))
    missed = {line["gate"]: line for line in gates["gates"] if not line["reached"]}
    return [_claim(task, gates["measures"], missed) for task in _MEASURES]


def _claim(task: str, measures: dict[str, Any], missed: dict[str, dict[str, Any]]) -> str:
    names = _MEASURES[task]
    failed = [line for gate, line in missed.items() if any(name in gate for name in names)]
    if failed:
        told = "; ".join(f"{line['gate']} is {line['found']}, limit {line['limit']}" for line in failed)
        return f"{task}: misses its gate ({told})"
    found = " and ".join(f"{measures[name]['wer']:.1%}{_how(name, task)}" for name in names)
    utterances = measures[names[0]]["utterances"]
    if task == "stt":
        return f"{task}: {found} of the words wrong, in {utterances} held-out recordings"
    natural = measures["natural"]["wer"]
    return (
        f"{task}: an independent recogniser hears {found} of the words wrong, and {natural:.1%} in the recordings "
        f"themselves ({utterances} utterances)"
    )


def _how(name: str, task: str) -> str:
    how = name.removeprefix(task).strip()
    return f" ({how})" if how else ""
