"""Give a checkpoint of spoken digits its speech domain: reference clips and held-out utterances.

    python tools/train_demo/speech_domain.py CHECKPOINT [--utterances 240] [--unseen]

Writes CHECKPOINT/speech_domain.json and the clips that it names, synthesised with espeak-ng, as the recipe does; more
utterances make the intervals of the conformance family "speech" narrower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from gpa_codecs.errors import CheckpointError, GpaError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint that was trained on spoken digits.")],
    utterances: Annotated[int, typer.Option(min=1, max=10_000, help="Held-out recordings.")] = 240,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="With a quarter as many in voices that it was not trained on.")
    ] = False,
) -> None:
    """Write CHECKPOINT/speech_domain.json and its clips, and print the file's path. A domain that is there is replaced.

    Equal arguments and versions give equal bytes. Needs pip install 'gpa-engines[train]'.
    """
    try:
        if not (checkpoint / "config.json").is_file():
            raise CheckpointError(f"{checkpoint} is no checkpoint: it has no config.json")
        from demo_training.corpus import UNSEEN_VOICES, VOICES
        from demo_training.domain import narrating, write_digit_domain

        strangers = UNSEEN_VOICES if unseen else ()
        domain = write_digit_domain(checkpoint, narrating((*VOICES, *strangers)), utterances, unseen=strangers)
    except GpaError as error:
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "red"), str(error)))
        raise typer.Exit(2) from error
    typer.echo(domain.folder / "speech_domain.json")


if __name__ == "__main__":
    app()
