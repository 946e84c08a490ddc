"""What the user is told on standard error while the work runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.status import Status
from rich.text import Text

from gpa_codecs.codec import SEMANTIC_RATE
from gpa_codecs.prompts import Task
from gpa_engines.speech.results import Progress, ProgressCallback

MOST_WARNINGS = 4

WORK: dict[Task, str] = {"stt": "transcribing", "tts-a": "speaking", "vc": "converting"}


class Narrator:
    """Notes and warnings always; stages and figures when standard error is a terminal, or with `verbose`.

    On a terminal the current stage is one line that changes in place; use the narrator in a `with` block, which removes
    that line at the end. In a file or pipe, `verbose` gives one line for each stage.
    """

    def __init__(self, verbose: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._talkative = verbose or self._console.is_terminal
        self._status: Status | None = None
        self._stage = ""

    def __enter__(self) -> Narrator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.rest()

    def rest(self) -> None:
        """Remove the line of the current stage; the next stage brings it back."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def stage(self, name: str, figures: str = "") -> None:
        """Say what is being done, and how far it is."""
        new = name != self._stage
        self._stage = name
        line = Text(f"{name} {figures}".rstrip())
        if not self._talkative:
            return
        if not self._console.is_terminal:
            if new:
                self._print("", name)
        elif self._status is None:
            self._status = self._console.status(line)
            self._status.start()
        else:
            self._status.update(line)

    def say(self, line: str) -> None:
        """A line for those who look."""
        if self._talkative:
            self._print("", line)

    def note(self, line: str) -> None:
        """What the user should know."""
        self._print("note: ", line)

    def warn(self, lines: Sequence[str]) -> None:
        """What may be wrong with the result; of many warnings, those of many pieces, the first few."""
        shown = lines if len(lines) <= MOST_WARNINGS else lines[: MOST_WARNINGS - 1]
        for line in shown:
            self._print("warning: ", line, "yellow")
        if len(lines) > len(shown):
            self._print("warning: ", f"and {len(lines) - len(shown)} more; --json lists them all", "yellow")

    def watch(self, task: Task, result_on_terminal: bool = False) -> ProgressCallback:
        """A callback for the speech model. result_on_terminal: the result is written to this terminal as it comes."""
        started = 0.0
        split = False

        def tell(progress: Progress) -> None:
            nonlocal started, split
            if progress.pieces > 1 and not split:
                split = True
                self.note(split_note(task, progress.pieces))
            if result_on_terminal and progress.tokens:
                return
            if progress.stage == "encode":
                self.stage("encoding the audio")
                return
            now = time.perf_counter()
            if progress.tokens and not started:
                started = now
            self.stage(WORK[task], _figures(task, progress.tokens, now - started))

        return tell

    def _print(self, label: str, line: str, style: str = "bold") -> None:
        self._console.print(Text.assemble((label, style), line), soft_wrap=True)


def split_note(task: Task, pieces: int) -> str:
    """How a user is told that a text or clip was longer than one request."""
    what = "text" if task == "tts-a" else "audio"
    return f"the {what} was split into {pieces} pieces"


def _figures(task: Task, tokens: int, seconds: float) -> str:
    if not tokens:
        return ""
    figures = [f"{tokens} tokens"]
    if tokens > 1 and seconds > 0:
        figures.append(f"{(tokens - 1) / seconds:.1f} tok/s")
    if task != "stt":
        figures.append(f"{tokens / SEMANTIC_RATE:.1f} s of audio")
    return ", ".join(figures)
