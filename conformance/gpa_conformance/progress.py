"""What the user sees on standard error while a run goes on."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.text import Text

from gpa_conformance.cases import Case
from gpa_conformance.results import CaseResult, Status

STYLES: dict[Status, str] = {
    "passed": "green",
    "failed": "bold red",
    "error": "bold red",
    "skipped": "yellow",
    "known-failure": "yellow",
    "unexpected-pass": "magenta",
}


class RunProgress:
    """On a terminal one line that changes, and a line for every case that did not pass; else a line for every case."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._status = self._console.status("starting") if self._console.is_terminal else None
        self._step = ""

    def __enter__(self) -> RunProgress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def baseline(self, step: str, done: int, total: int) -> None:
        """A step of a baseline that is being made."""
        self._tell(f"baseline {done}/{total}: {step}")

    def case(self, case: Case, result: CaseResult | None, done: int, total: int) -> None:
        """The start or the end of a case."""
        if result is None:
            if self._status is not None:
                self._status.update(Text(f"{done}/{total} {case.id}"))
            return
        if self._status is None or result.status != "passed":
            reason = f": {result.reason}" if result.reason and result.status != "passed" else ""
            line = Text(f"[{done}/{total}] {case.id} ")
            line.append(result.status, STYLES[result.status])
            line.append(f" {result.seconds:.1f} s{reason}")
            self._console.print(line, soft_wrap=True)

    def _tell(self, line: str) -> None:
        if self._status is not None:
            self._status.update(Text(line))
        else:
            self._console.print(Text(line), soft_wrap=True)
