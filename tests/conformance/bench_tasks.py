"""What the tests of gpa-bench's tasks share: running a command, and the fields of every document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpa_conformance.bench import cli
from gpa_engines.checkpoint import Checkpoint

COMMON = {"schema", "created", "failed", "settings", "engine", "machine", "checkpoint", "notes"}

MEMORY = {
    *("source", "allocated", "reserved", "peak_allocated", "peak_reserved"),
    *("host_resident", "host_peak_resident"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What a command left behind. folder: the current one while it ran."""

    status: int
    out: str
    err: str
    folder: Path

    def document(self, name: str) -> dict[str, Any]:
        """A file that it wrote; JSON has no NaN, and neither has this."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"), parse_constant=_refuse)

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


GpaBench = Callable[..., Run]


def bench_in(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> GpaBench:
    """Runs `gpa-bench` in this process, in an empty folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: str | Path) -> Run:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return Run(status, output.out, output.err, folder)

    return run


def bench_process(folder: Path, *arguments: str | Path) -> Run:
    """Runs `gpa-bench` as a process of its own in `folder`, for fixtures that outlive a test."""
    done = subprocess.run(
        [sys.executable, "-m", "gpa_conformance.bench.cli", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr, folder)


def check_common(document: dict[str, Any], schema: str, model: Path) -> None:
    """The fields that every document of a task has."""
    assert set(document) >= COMMON
    assert document["schema"] == schema
    assert document["failed"] is None
    assert document["settings"]["model"] == str(model)
    assert document["settings"]["threads"] == 1
    assert document["engine"]["info"]["backend"] == "torch"
    assert document["engine"]["load_s"] > 0
    assert document["machine"]["packages"]["torch"]
    assert document["checkpoint"]["random_weights"] is False
    assert document["checkpoint"]["lm_bytes"] == (model / "model.safetensors").stat().st_size
    assert document["checkpoint"]["sha256"] == Checkpoint.open(model, require=("lm", "tokenizer")).fingerprint()


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
