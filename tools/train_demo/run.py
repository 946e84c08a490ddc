"""Train the demo checkpoint from nothing: python tools/train_demo/run.py --out DIR."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from gpa_codecs.errors import BackendError, GpaError

EPILOG = "Exit status: 0; 1 when a gate is not reached; 2 for what cannot be run; 130 after Ctrl-C."

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog=EPILOG)
def main(
    out: Annotated[Path, typer.Option(help="Folder of the run; the checkpoint comes to OUT/checkpoint.")],
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this stage, may be given several times. Without --resume it begins anew, and what was made from "
            "its result is removed."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that OUT holds.")] = False,
    device: Annotated[str, typer.Option(help="Where networks train: cpu, cuda, cuda:N or mps.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of each process.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Stages that may run side by side.")] = 2,
    scale: Annotated[
        float, typer.Option(help="Factor on numbers of steps and sizes of corpora; 0.01 tries the recipe out.")
    ] = 1.0,
) -> None:
    """Synthesise spoken digits, train codec, GLM tokenizer and language model on them, write the checkpoint in the
    released layout and measure it.

    Needs pip install 'gpa-engines[train]'. The stages are corpus, semantic, glm, tokens, voice, lm, generator, echo,
    tuning, export, domain, listen, speak and gates; each leaves its result in OUT/stages or OUT/checkpoint and its log
    in OUT/logs. A run that was interrupted goes on with --resume, inside a stage too. The same seed, threads and
    machine give the same weights.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    # A run that is told to end takes its stages with it, as with Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        for package in ("torch", "espeakng_loader", "pocketsphinx"):
            if find_spec(package) is None:
                raise BackendError(f"training needs {package.replace('_', '-')}: pip install 'gpa-engines[train]'")
        from demo_training.session import Choices, run

        reached = run(Choices(out, seed, scale, device, threads, processes, tuple(stage or ()), resume), console)
    except GpaError as error:
        console.print(Text.assemble(("error: ", "red"), str(error)))
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print(f"interrupted; go on with --out {out} --resume")
        raise typer.Exit(130) from None
    if not reached:
        raise typer.Exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    app()
