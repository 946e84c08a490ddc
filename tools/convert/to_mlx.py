"""Convert a checkpoint's language model for MLX: python tools/convert/to_mlx.py MODEL_DIR --out DIR --bits 8."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from mlx_conversion.faults import ConversionFault
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from gpa_codecs.errors import GpaError
from gpa_engines.hub import resolve_model
from gpa_engines.interruption import interruptible

if TYPE_CHECKING:
    from mlx_conversion.plan import Plan
    from mlx_conversion.verification import Verification

Dtype = Literal["float32", "float16", "bfloat16"]

FAULT, MISUSE, INTERRUPTED = 1, 2, 130

HELP = """
Write the language model of a checkpoint as a folder for MLX: config.json, model.safetensors and the tokenizer's files,
as mlx-lm writes and reads them, with a record of what it was made of that gpa-engines checks at load.

With --bits every matrix is quantised in groups along its rows. Without, the weights are floating point, as stored or in
--dtype; MLX reads the checkpoint itself just as well. The folder appears when it is whole; nothing is left of one that
failed. It holds no codec: the checkpoint's own is used beside it.

Needs mlx (pip install 'gpa-engines[mlx]'), no torch. Exit status: 0; 1 if --verify found a fault; 2 for a checkpoint or
a choice that cannot be converted; 130 after Ctrl-C.
"""


app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.command(help=HELP)
def main(
    model_dir: Annotated[str, typer.Argument(help="Checkpoint folder (or demo, or a hub id).")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    bits: Annotated[int | None, typer.Option(help="8 or 4: quantise.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Values of a row that share a scale: 32, 64 (as without) or 128.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of weights that are not quantised; as stored without.")] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read the folder again before it takes its name: tensors, rounding errors, logits."
        ),
    ] = False,
) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with interruptible():
            _convert(console, resolve_model(model_dir, progress=console.print), out, bits, group_size, dtype, verify)
    except GpaError as error:
        console.print(Text.assemble(("error: ", "red"), str(error)))
        raise typer.Exit(FAULT if isinstance(error, ConversionFault) else MISUSE) from error
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(out)


def _convert(
    console: Console,
    model_dir: Path,
    out: Path,
    bits: int | None,
    group_size: int | None,
    dtype: str | None,
    verify: bool,
) -> None:
    if find_spec("mlx") is None:
        raise GpaError("the conversion needs mlx: pip install 'gpa-engines[mlx]'")
    from mlx_conversion.plan import make_plan
    from mlx_conversion.verification import verify as read_again
    from mlx_conversion.writing import check_target, write_plan

    check_target(out)
    started = time.perf_counter()
    plan = make_plan(model_dir, bits, group_size, dtype)
    found: list[Verification] = []
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bar:
        task = bar.add_task("checking", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        def inspect(folder: Path) -> None:
            if verify:
                found.append(read_again(plan, folder, progress))

        write_plan(plan, out, progress, inspect)
    console.print(_describe(plan, out, time.perf_counter() - started))
    for each in found:
        console.print(_describe_verification(each))


def _describe(plan: Plan, out: Path, seconds: float) -> str:
    size = (out / "model.safetensors").stat().st_size
    chosen = plan.quantization
    kind = f"{chosen.bits} bits in groups of {chosen.group_size}" if chosen else plan.dtype or "as stored"
    return f"{len(plan.stored)} tensors, {kind}, {size / 2**20:.1f} MiB, in {seconds:.1f} s"


def _describe_verification(found: Verification) -> str:
    rounding = f", at most {found.steps:.2f} steps of its group for a weight" if found.steps else ""
    return (
        f"verified: {found.tensors} tensors; weights {found.weight_error:.2e} (relative L2){rounding}; "
        f"logits {found.logits:.2e}, the same best id at {found.agreed} of {found.positions} positions"
    )


if __name__ == "__main__":
    app()
