"""Write a random-weight checkpoint in GPA's released layout: python tools/make_checkpoint.py OUT --size tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from gpa_codecs.errors import GpaError
from gpa_engines.interruption import interruptible
from gpa_engines.random_checkpoint import Size, make_checkpoint


def main(
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    size: Annotated[Size, typer.Option(help="tiny: some MB; full: the released dimensions, 3.8 GB.")] = "tiny",
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes on every machine.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a random checkpoint at OUT.")] = False,
) -> None:
    """Write a random-weight checkpoint: its output is noise; it serves to try, test and measure."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with interruptible(), Progress(*columns, console=console) as bar:
            task = bar.add_task("weights", total=None)
            path = make_checkpoint(
                out,
                size,
                seed,
                overwrite=overwrite,
                progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
            )
    except GpaError as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        raise typer.Exit(130) from None
    typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
