"""A run of the recipe: stages in processes, as many side by side as may be, and their progress in the terminal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from demo_training.provenance import commit, versions
from demo_training.stages import STAGES, Stage
from gpa_codecs.errors import BackendError, CheckpointError, GpaError
from gpa_codecs.files import write_atomically

RUN_FILE = "run.json"
_STAGE_SCRIPT = Path(__file__).parents[1] / "stage.py"

# glibc gives large blocks back to the system with every free, and takes them again: half of the time goes there.
_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "134217728",
}


@dataclass(frozen=True, slots=True)
class Choices:
    """What the command line says. stages: only these; none for all that are not done. The rest is as in Recipe."""

    out: Path
    seed: int
    scale: float
    device: str
    threads: int
    processes: int
    stages: tuple[str, ...]
    resume: bool


def run(choices: Choices, console: Console) -> bool:
    """Run what is to be run. Returns whether every gate that was measured is reached. Raises GpaError."""
    _check(choices)
    _open_folder(choices)
    names = choices.stages or tuple(STAGES)
    if choices.resume or not choices.stages:
        names = tuple(name for name in names if not STAGES[name].is_done(choices.out))
    else:
        for stage in _and_dependents(names):
            _forget(choices.out, stage)
    with Progress(
        TextColumn("{task.description:38}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    ) as progress:
        _Session(choices, progress).run([STAGES[name] for name in STAGES if name in names])
    return _show_gates(choices.out, console)


def _check(choices: Choices) -> None:
    if unknown := [name for name in choices.stages if name not in STAGES]:
        raise GpaError(f"there is no stage {unknown[0]!r}; expected any of {', '.join(STAGES)}")
    if not 0 < choices.scale <= 1:
        raise GpaError(f"--scale is {choices.scale:g}; expected more than 0 and at most 1")
    if choices.device != "cpu":
        import torch

        try:
            torch.empty(0, device=choices.device)
        except (RuntimeError, AssertionError) as error:
            raise BackendError(f"device {choices.device!r} is not there: {str(error).splitlines()[0]}") from error


def _open_folder(choices: Choices) -> None:
    """Begin a run in a new folder, or make sure that the one there is this run."""
    settings = {"seed": choices.seed, "scale": choices.scale}
    path = choices.out / RUN_FILE
    if path.is_file():
        if not choices.resume and not choices.stages:
            raise CheckpointError(f"{choices.out} holds a run; go on with --resume, or give a new folder")
        found = json.loads(path.read_text(encoding="utf-8"))
        if other := [name for name, value in settings.items() if found.get(name) != value]:
            name = other[0]
            raise CheckpointError(f"{path}: {name} is {found.get(name)}, not {settings[name]}; give another folder")
        return
    if choices.out.is_dir() and any(choices.out.iterdir()):
        raise CheckpointError(f"{choices.out} is not empty and holds no run; give a new folder")
    if choices.resume:
        raise CheckpointError(f"{choices.out} holds no run to go on with; leave out --resume")
    choices.out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"device": choices.device, "threads": choices.threads}
    content = json.dumps({**settings, **facts, "commit": commit(), "versions": versions()}, indent=2) + "\n"
    write_atomically(path, content.encode())


def _and_dependents(names: Sequence[str]) -> list[Stage]:
    """These stages and all that were made from their results, which are out of date with them."""
    found = set(names)
    for stage in STAGES.values():  # what is needed comes before what needs it
        if found & set(stage.needs):
            found.add(stage.name)
    return [STAGES[name] for name in STAGES if name in found]


def _forget(out: Path, stage: Stage) -> None:
    """Remove a stage's result and what it had begun."""
    (out / stage.result).unlink(missing_ok=True)
    for suffix in (".jsonl", ".json"):
        (out / "logs" / f"{stage.name}{suffix}").unlink(missing_ok=True)
    for begun in (out / "work").glob(f"{stage.name}[.-]*"):
        begun.unlink()
    if stage.name == "export":
        shutil.rmtree(out / "checkpoint", ignore_errors=True)


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[str]
    errors: IO[str]
    reader: Thread


class _Session:
    def __init__(self, choices: Choices, progress: Progress) -> None:
        self._choices = choices
        self._progress = progress
        self._running: dict[str, _Running] = {}

    def run(self, stages: list[Stage]) -> None:
        """Run these stages, each as soon as what it needs is done. Raises GpaError when one fails."""
        waiting = list(stages)
        bars = {stage.name: self._bar(stage) for stage in stages}
        with self._stopping_all():
            while waiting or self._running:
                for stage in list(waiting):
                    if len(self._running) < self._choices.processes and self._is_ready(stage, waiting):
                        waiting.remove(stage)
                        self._progress.reset(bars[stage.name], total=None)
                        self._running[stage.name] = self._start(stage, bars[stage.name])
                if not self._running:
                    stage = waiting[0]
                    raise GpaError(f"stage {stage.name!r} needs {', '.join(stage.needs)}, not all of which are done")
                self._collect()

    def _bar(self, stage: Stage) -> TaskID:
        return self._progress.add_task(f"{stage.name}: {stage.about}", start=False, total=None, figures="")

    def _is_ready(self, stage: Stage, waiting: list[Stage]) -> bool:
        pending = {other.name for other in waiting} | set(self._running)
        return all(name not in pending and STAGES[name].is_done(self._choices.out) for name in stage.needs)

    def _start(self, stage: Stage, bar: TaskID) -> _Running:
        choices = self._choices
        options = {"out": choices.out, "seed": choices.seed, "scale": choices.scale}
        threads = choices.threads * (choices.processes if stage.alone else 1)
        options |= {"device": choices.device, "threads": threads}
        command = [sys.executable, str(_STAGE_SCRIPT), stage.name]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        environment = os.environ | _MALLOC | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        errors = TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed when the stage ends
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        reader = Thread(target=self._read, args=(process, bar), daemon=True)
        reader.start()
        return _Running(process, errors, reader)

    def _read(self, process: subprocess.Popen[str], bar: TaskID) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            told = json.loads(line)
            figures = "  ".join(f"{name} {value:.3g}" for name, value in told["figures"].items())
            self._progress.update(bar, completed=told["done"], total=told["total"], figures=figures)

    def _collect(self) -> None:
        """Take note of a stage that has ended, or wait a little."""
        for name, running in list(self._running.items()):
            if running.process.poll() is None:
                continue
            running.reader.join()
            del self._running[name]
            with running.errors:
                running.errors.seek(0)
                said = running.errors.read().strip()
            status = running.process.returncode
            if status == 2 and said.startswith("error: "):
                raise GpaError(said.removeprefix("error: "))
            if status:
                raise GpaError(f"stage {name!r} ended with status {status}:\n{said[-4000:]}")
            return
        time.sleep(0.2)

    @contextmanager
    def _stopping_all(self) -> Iterator[None]:
        """Whatever ends the block leaves no process behind."""
        try:
            yield
        finally:
            for running in self._running.values():
                running.process.terminate()
            for running in self._running.values():
                running.process.wait()
                running.errors.close()


def _show_gates(out: Path, console: Console) -> bool:
    path = out / STAGES["gates"].result
    if not path.is_file():
        return True
    gates = json.loads(path.read_text(encoding="utf-8"))
    for line in gates["gates"]:
        mark = "[green]reached[/]" if line["reached"] else "[red]missed[/] "
        console.print(f"{mark}  {line['gate']}: {line['found']} (limit {line['limit']})")
    return all(line["reached"] for line in gates["gates"])
