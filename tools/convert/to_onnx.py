"""Convert a checkpoint's codec and language model to ONNX: python tools/convert/to_onnx.py MODEL_DIR."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from gpa_codecs.errors import BackendError, GpaError
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.hub import resolve_model
from gpa_engines.interruption import interruptible

if TYPE_CHECKING:
    from onnx_conversion.verification import Comparison

Subject = Literal["codec", "lm"]
What = Literal["codec", "lm", "all"]


class Precision(StrEnum):
    """Typer takes a list of these, but not of literals."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


HELP = """
Write the codec, the language model or both as ONNX graphs that run without torch: OUT/codec, OUT/lm, and beside them
the small files that make OUT a model folder. A folder takes its name when it is whole; nothing is left of one that
failed.

Precisions of the codec: the encoders stay in fp32, because fewer bits change their tokens; the decoder is written in
fp32 and in each --precision, and a program chooses among them when it runs. fp16 stores the weights in 16 bits and
computes in 32: less than half the file, the same memory, and a quarter slower than fp32, whose fast convolutions 16
bits would spoil. int8 stores the prenet's matrices in 8 bits and multiplies in 8 bits: a third of the prenet's file and
memory; the wave generator, which takes nine tenths of the time, stays as in fp32. Signal-to-noise ratio of the audio
against torch, with random weights of the released sizes: fp32 98 dB, fp16 47 dB, int8 18 dB.

Needs torch and onnx, and onnxruntime for --verify (pip install 'gpa-engines\\[convert]'); 8 GB of memory for the
released checkpoint. Exit status: 0; 1 if --verify found a fault; 2 for a checkpoint or a choice that cannot be
converted; 130 after Ctrl-C.
"""


app = typer.Typer(add_completion=False, rich_markup_mode="rich")

MAKERS = ("torch", "onnx")
"""Packages that a conversion needs."""


@app.command(help=HELP)
def main(
    model_dir: Annotated[str, typer.Argument(help="Checkpoint folder (or demo, or a hub id).")],
    out: Annotated[Path | None, typer.Option(help="Folder to write into. Default: MODEL_DIR/onnx.")] = None,
    what: Annotated[What, typer.Option(help="What is converted.")] = "all",
    precision: Annotated[
        list[Precision] | None, typer.Option(help="May be given several times. Default: fp32.", show_default=False)
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with the checkpoint in torch; the codec before it takes its name.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier conversion wrote.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for each graph and comparison.")] = False,
) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with interruptible():
            subjects: list[Subject] = ["codec", "lm"] if what == "all" else [what]
            root = resolve_model(model_dir, progress=console.print)
            job = Job(
                root,
                out or root / "onnx",
                subjects,
                [each.value for each in precision or [Precision.fp32]],
                verify,
                verbose,
                console,
            )
            job.check(overwrite)
            faults = [fault for subject in subjects for fault in job.convert(subject)]
    except GpaError as error:
        console.print(Text.assemble(("error: ", "red"), str(error)))
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left of the folder that was being written")
        raise typer.Exit(130) from None
    for fault in faults:
        console.print(Text.assemble(("fault: ", "red"), fault))
    if faults:
        raise typer.Exit(1)
    typer.echo(job.out)


@dataclass(frozen=True, slots=True)
class Job:
    """One conversion as it was asked for."""

    root: Path
    out: Path
    subjects: Sequence[Subject]
    precisions: Sequence[str]
    verify: bool
    verbose: bool
    console: Console

    def check(self, overwrite: bool) -> None:
        """Raise GpaError for what can be known before anything is written."""
        packages = set(MAKERS)
        if self.verify:
            packages |= {"onnxruntime", "torch"}
        if missing := sorted(package for package in packages if find_spec(package) is None):
            raise BackendError(
                f"converting to ONNX needs {' and '.join(missing)}, not installed: pip install 'gpa-engines[convert]'"
            )
        for subject in self.subjects:
            _check_target(self.out / subject, f"gpa-onnx-{subject}", overwrite)

    def convert(self, subject: Subject) -> list[str]:
        """Write one of the folders; returns what --verify found wrong with it (a faulty codec is then not there)."""
        if subject == "lm":
            from onnx_conversion.lm import export_lm

            with self._progress() as progress:
                export_lm(self.root, self.out, self.precisions, progress)
            return self._report(self._lm_comparisons())
        from onnx_conversion.codec import CODEC_PARTS, export_codec

        checkpoint = Checkpoint.open(self.root, require=CODEC_PARTS)
        try:
            with self._progress() as progress:
                export_codec(
                    checkpoint, self.out, self.precisions, progress, lambda folder: self._inspect(checkpoint, folder)
                )
        except FaultyError as error:
            return error.faults
        return []

    def _inspect(self, checkpoint: Checkpoint, folder: Path) -> None:
        if not self.verify:
            return
        from onnx_conversion.verification import compare_codecs

        if faults := self._report(compare_codecs(checkpoint, folder)):
            raise FaultyError(faults)

    def _lm_comparisons(self) -> Sequence[Comparison]:
        if not self.verify:
            return []
        from onnx_conversion.verification import compare_language_models

        return compare_language_models(self.root, self.out, self.precisions)

    def _report(self, comparisons: Sequence[Comparison]) -> list[str]:
        if self.verbose or self.console.is_terminal:
            for each in comparisons:
                self.console.print(f"{each.subject}: {each.outcome}")
        return [f"{each.subject}: {each.outcome}" for each in comparisons if not each.passed]

    @contextmanager
    def _progress(self) -> Generator[Callable[[str, int, int], None], None, None]:
        """What a conversion calls with the name of what it writes, how much is done, and how much there is."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("", total=None)
            current = ""

            def show(name: str, done: int, total: int) -> None:
                nonlocal current
                if self.verbose and name != current:
                    self.console.print(name)
                current = name
                bar.update(task, description=name, completed=done, total=total)

            yield show


class FaultyError(Exception):
    """A converted codec is not the one that it was made from."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


def _check_target(folder: Path, kind: str, overwrite: bool) -> None:
    """Refuse a folder that is there, unless it may be replaced without losing anything but an earlier conversion."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        ours = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("format") == kind
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise GpaError(f"{folder} is there and was not made by this tool; choose another --out")
    if not overwrite:
        raise GpaError(f"{folder} is there already; give another --out, or --overwrite to replace it")


if __name__ == "__main__":
    app()
