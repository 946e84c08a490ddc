"""What `gpa-bench` says while it works and when it fails, and how its reports reach the disk."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from gpa_codecs.errors import GpaError
from gpa_codecs.files import why_not_writable, write_atomically

TERMINATED = 143
"""Exit status after SIGTERM."""


class StepLine:
    """The current step on standard error: one changing line on a terminal, with verbose a line each."""

    def __init__(self, verbose: bool) -> None:
        console = Console(stderr=True, highlight=False)
        self._verbose = verbose
        self._console = console
        self._status = console.status("starting") if console.is_terminal and not verbose else None

    def __enter__(self) -> StepLine:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, step: str) -> None:
        if self._status is not None:
            self._status.update(step)
        elif self._verbose:
            self._console.print(step, soft_wrap=True)


@contextmanager
def terminable() -> Generator[None, None, None]:
    """SIGTERM unwinds like Ctrl-C, so that children and temporary files go too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_target(option: str, path: Path) -> None:
    """Say before the work starts that a report could not be written."""
    if problem := why_not_writable(path):
        raise GpaError(f"{option} {path}: cannot be written: {problem}")


def write_report(option: str, path: Path, content: bytes) -> None:
    """Write a report whole or not at all; raises GpaError naming option and file."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise GpaError(f"{option} {path}: cannot be written: {error.strerror or error}") from error


def complain(message: str) -> None:
    """One line on standard error."""
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
