"""`gpa-run --list-backends`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpa_engines.cli.output import print_json
from gpa_engines.registry import BackendStatus, list_backends

STYLES = {"ready": "green", "missing": "yellow"}

PIPE_WIDTH = 200
"""Columns where there is no terminal, so that no command line is broken in two."""


def stdout_console() -> Console:
    """A console for tables on standard output."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def print_backends(as_json: bool) -> None:
    """Every backend: whether it can run here, or what is missing and the command that installs it."""
    if as_json:
        print_json({"schema": "gpa-backends/1", "backends": [_entry(status) for status in list_backends()]})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("backend", "state", "runs on", "detail"):
        table.add_column(column)
    for status in list_backends():
        detail = f"{status.detail}: {status.remedy}" if status.remedy else status.detail
        state = Text(status.state, STYLES[status.state])
        table.add_row(status.backend.name, state, status.backend.runs_on, Text(detail))
    stdout_console().print(table)


def _entry(status: BackendStatus) -> dict[str, str]:
    return {
        "name": status.backend.name,
        "state": status.state,
        "runs_on": status.backend.runs_on,
        "detail": status.detail,
        "install": status.remedy,
    }
