"""One call of to_gguf.py: what is shown while files are planned, written and verified."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from gpa_codecs.errors import CheckpointError

from .metadata import Entry
from .plan import Choices, Plan, QuantizedFile, SimpleFile, make_plan
from .source import open_source
from .table import Table
from .verifying import Check, VerificationError, verify
from .writing import write_plan


def show(model_dir: Path, choices: Choices, *, verbose: bool) -> None:
    """Print the plan on standard output. verbose: every tensor instead of a count by type. Raises GpaError."""
    plan = make_plan(open_source(model_dir), choices)
    for table in plan.tables:
        typer.echo(f"{table.path}  {_mib(table.nbytes)}")
        typer.echo(f"  embeddings  {table.dtype} {list(table.embeddings.shape)}")
    for file in plan.files:
        quantized = isinstance(file, QuantizedFile)
        simple = file.intermediate if quantized else file
        typer.echo(f"{file.path}  {'at most ' if quantized else ''}{_mib(file.nbytes)}")
        if quantized:
            typer.echo(f"  made by llama.cpp as {file.file_type} from these tensors, {_mib(simple.nbytes)}:")
        for line in _tensor_lines(simple, verbose):
            typer.echo(f"  {line}")
        for entry in simple.metadata:
            typer.echo(f"  {entry.key} = {_shown(entry)}")
    for note in plan.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{_mib(plan.nbytes)} of disk needed; nothing was written")


def convert(model_dir: Path, choices: Choices, console: Console, *, check: bool, verbose: bool) -> bool:
    """Write the files and print their paths; True when a check failed. Raises GpaError and KeyboardInterrupt."""
    started = time.perf_counter()
    console.print(f"reading {model_dir}")
    plan = make_plan(open_source(model_dir), choices)
    for note in plan.notes:
        console.print(Text.assemble(("note: ", "yellow"), note))
    written: list[Path] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as bars:
            reporter = _Reporter(console, bars, verbose)
            inspect = _inspection(plan, reporter) if check else reporter.finished
            if check:
                for table in plan.kept:
                    inspect(table, table.path)
            log = console.print if verbose else lambda line: None
            written.extend(write_plan(plan, reporter.progress, inspect, log))
    except VerificationError as error:
        console.print(Text.assemble(("verification failed: ", "red"), str(error)))
        return True
    finally:
        # Not before: the bars would take what is printed.
        for path in written:
            typer.echo(path)
    console.print(f"done in {time.perf_counter() - started:.1f} s")
    return False


class _Reporter:
    """A bar per file, a line per tensor with `verbose`."""

    def __init__(self, console: Console, bars: Progress, verbose: bool) -> None:
        self.console = console
        self._bars = bars
        self._verbose = verbose
        self._tasks: dict[str, TaskID] = {}

    def progress(self, file: str, tensor: str, done: int, total: int) -> None:
        if file not in self._tasks:
            self._tasks[file] = self._bars.add_task(file, total=total)
        self._bars.update(self._tasks[file], description=f"{file}  {tensor}", completed=done)
        if self._verbose:
            self.console.print(f"{file}: {tensor}")

    def finished(self, target: SimpleFile | QuantizedFile | Table, path: Path) -> None:
        """A file is whole."""
        for file, task in self._tasks.items():
            self._bars.update(task, description=file, visible=False)
        self.console.print(f"{target.path.name}  {_mib(path.stat().st_size)}")


def _inspection(plan: Plan, reporter: _Reporter) -> Callable[[SimpleFile | QuantizedFile | Table, Path], None]:
    def inspect(target: SimpleFile | QuantizedFile | Table, path: Path) -> None:
        reporter.finished(target, path)
        try:
            checks = verify(plan.source, target, path)
        except CheckpointError as error:
            checks = [Check("file", False, str(error))]
        words = {True: ("  ok      ", "green"), False: ("  FAILED  ", "red"), None: ("  skipped ", "yellow")}
        for each in checks:
            reporter.console.print(Text.assemble(words[each.passed], f"{each.what}: {each.detail}"))
        failed = [each.what for each in checks if each.passed is False]
        if failed:
            kept = "it was there before: --overwrite replaces it" if target in plan.kept else "the file was removed"
            raise VerificationError(f"{target.path.name}: {', '.join(failed)}; {kept}")

    return inspect


def _tensor_lines(file: SimpleFile, verbose: bool) -> list[str]:
    if verbose:
        return [f"{each.name}  {each.type} {list(each.shape)}  from {each.source.name}" for each in file.tensors]
    kinds = dict.fromkeys(each.type for each in file.tensors)
    lines = []
    for kind in kinds:
        tensors = [each for each in file.tensors if each.type == kind]
        values = sum(prod(each.shape) for each in tensors)
        lines.append(f"{len(tensors)} tensors {kind}, {values:,} values, {_mib(sum(each.nbytes for each in tensors))}")
    return lines


def _shown(entry: Entry) -> str:
    if not entry.is_array or len(str(entry.value)) <= 100:
        return str(entry.value)
    assert not isinstance(entry.value, bool | int | float | str)
    return f"{len(entry.value)} of {entry.type.name.lower()}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
