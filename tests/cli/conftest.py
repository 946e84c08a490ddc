"""`gpa-run` in this process, and as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpa_engines.cli.run import main


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left behind. stdout may be audio."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode()


GpaRun = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, with no model chosen by the environment."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("GPA_MODEL", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def gpa_run(capfdbinary: pytest.CaptureFixture[bytes]) -> GpaRun:
    """Run the command in this process: gpa_run("--task", "stt", ...)."""

    def run(*arguments: str | Path) -> Outcome:
        capfdbinary.readouterr()
        status = main([str(argument) for argument in arguments])
        output = capfdbinary.readouterr()
        return Outcome(status, output.out, output.err.decode())

    return run


def command(*arguments: str | Path) -> list[str]:
    """The command line of a process."""
    return [sys.executable, "-m", "gpa_engines.cli", *map(str, arguments)]


def run_process(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> Outcome:
    """Run the command as a process of its own."""
    done = subprocess.run(
        command(*arguments), input=stdin, capture_output=True, env=os.environ | environment, timeout=120, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr.decode())
