"""Convert a checkpoint's language model to GGUF for llama.cpp: python tools/convert/to_gguf.py MODEL_DIR."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from gpa_codecs.errors import BackendError, GpaError
from gpa_engines.hub import resolve_model
from gpa_engines.interruption import interruptible

EPILOG = "Exit status: 0; 1 when --verify finds a fault; 2 for what cannot be converted; 130 after Ctrl-C."

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=EPILOG)
def main(
    model_dir: Annotated[
        str, typer.Argument(help="Checkpoint folder with its weights as safetensors (or demo, or a hub id).")
    ],
    outfile: Annotated[
        Path | None,
        typer.Option(help="A file that ends in .gguf, or an existing folder.", show_default="MODEL_DIR"),
    ] = None,
    outtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "auto"] | None,
        typer.Option(
            help="How weights are stored; auto is as in the checkpoint. Given with --quantize, that file is made too.",
            show_default="auto; none with --quantize",
        ),
    ] = None,
    quantize: Annotated[
        Literal["Q4_K_M", "Q5_K_M", "Q6_K"] | None,
        typer.Option(help="A K-quant, which llama.cpp makes: needs llama-cpp-python."),
    ] = None,
    vocab: Annotated[
        Literal["full", "speech", "text", "all"],
        typer.Option(
            help="full: every id. speech: what tts-a and vc emit. text: what stt and text emit. all: three files."
        ),
    ] = "full",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare each file with the checkpoint before it takes its name: tensors, rounding errors, all token "
            "texts and, where llama-cpp-python is installed, logits.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    model_name: Annotated[
        str | None,
        typer.Option(help="Begins the file names; general.name in the metadata.", show_default="the folder's name"),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print a line for every tensor, and llama.cpp's own lines.")
    ] = False,
) -> None:
    """Write the language model of a checkpoint as GGUF files for llama.cpp; their paths go to standard output.

    The files are NAME-TYPE.gguf, NAME-speech-TYPE.gguf and NAME-text-TYPE.gguf. A speech or text file holds only the
    ids that its tasks emit, which makes it smaller and faster; its prompts are read from the embedding table beside it,
    NAME-embeddings-f16.safetensors (f32 for --outtype f32), which is written too unless it is there.

    The metadata says which checkpoint a file was made from, and gpa-engines checks it. A file takes its name once it
    is whole and on the disk; a failure or Ctrl-C leaves nothing of it.

    Needs gguf and NumPy, no torch.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with interruptible():
            if find_spec("gguf") is None:
                raise BackendError("converting to GGUF needs gguf: pip install gguf")
            from gguf_conversion.plan import Choices
            from gguf_conversion.session import convert, show

            choices = Choices(
                outfile=outfile,
                outtype=outtype,
                quantize=quantize,
                vocabularies=("full", "speech", "text") if vocab == "all" else (vocab,),
                overwrite=overwrite,
                model_name=model_name,
            )
            root = resolve_model(model_dir, progress=console.print)
            if dry_run:
                show(root, choices, verbose=verbose)
                return
            failed = convert(root, choices, console, check=verify, verbose=verbose)
    except GpaError as error:
        console.print(Text.assemble(("error: ", "red"), str(error)))
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left of the file that was being written")
        raise typer.Exit(130) from None
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
