"""`gpa-bench`: exit status 0 when everything was measured, 1 when something failed, 2 for misuse, 130 for
Ctrl-C, 143 for SIGTERM."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from gpa_codecs.errors import GpaError
from gpa_conformance.bench import task_commands
from gpa_conformance.bench.console import StepLine, check_target, complain, terminable, write_report

FAILED, MISUSE, INTERRUPTED = 1, 2, 130

PLAIN_WIDTH = 160
"""Columns of a table that goes into a file or pipe."""

COMMAND_LINE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
"""The base of everything that typer says about a command line; which module it lives in depends on typer's version."""

app = typer.Typer(
    name="gpa-bench",
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback()
def _about() -> None:
    """Measure engines and the codec of a GPA checkpoint, side by side under the same conditions."""


@app.command()
def engine(
    model: Annotated[str, typer.Option(metavar="DIR", help="Checkpoint folder, hub id, demo or tiny-random.")],
    backend: Annotated[
        list[str],
        typer.Option(metavar="NAME[:DTYPE]", help="Backend to measure, e.g. torch, llama-cpp:q8_0; repeat."),
    ] = ["torch"],  # noqa: B006
    dtype: Annotated[
        list[str], typer.Option(help="Dtype of every backend that is named without one; repeat for several.")
    ] = ["float32"],  # noqa: B006
    vs: Annotated[str | None, typer.Option(metavar="transformers", help="Yardstick to run beside.")] = None,
    vs_batch: Annotated[list[int], typer.Option(help="Batch that the yardstick runs too.")] = [1],  # noqa: B006
    device: Annotated[str, typer.Option(help="Device of the engines, e.g. cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of each contender.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(help="Length of every prompt.")] = 200,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each request decodes.")] = 64,
    batch: Annotated[list[int], typer.Option(help="Concurrent requests; repeat.")] = [1, 4, 16],  # noqa: B006
    head: Annotated[list[str], typer.Option(help="LM head: full or restricted; repeat.")] = ["full", "restricted"],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 3,
    logit_positions: Annotated[int, typer.Option(help="Positions of the comparison of logits; 0: none.")] = 256,
    codec: Annotated[bool, typer.Option(help="Measure the stages of the codec.")] = True,
    codec_in: Annotated[
        list[str], typer.Option(metavar="torch|onnx", help="What the codec runs in; repeat for both, side by side.")
    ] = ["torch"],  # noqa: B006
    jobs: Annotated[bool, typer.Option(help="Run a tts-a and an stt job per engine for their peak memory.")] = False,
    option: Annotated[
        list[str],
        typer.Option(metavar="[NAME:]KEY=VALUE", help="Another option of every backend, or of the named one; repeat."),
    ] = [],  # noqa: B006
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Longest wait for one answer.")] = 900.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every sample here.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Progress line by line, and tracebacks.")] = False,
) -> int:
    """Load time, peak memory, prefill and decode speed, distance of the logits, and the codec's stages."""
    from gpa_conformance.bench.benchmark import Settings, run_benchmark
    from gpa_conformance.bench.options import options_by_backend
    from gpa_conformance.bench.report import document, encode
    from gpa_conformance.bench.tables import print_tables
    from gpa_conformance.bench.workload import Workload

    settings = Settings(
        model=model,
        backends=tuple(dict.fromkeys(backend)),
        dtypes=tuple(dict.fromkeys(dtype)),
        device=device,
        threads=threads,
        workload=Workload(prompt_tokens, new_tokens, tuple(batch), tuple(head), repeats, logit_positions),  # pyright: ignore[reportArgumentType]
        vs=vs,
        vs_batches=tuple(vs_batch),
        codecs=tuple(dict.fromkeys(codec_in)) if codec else (),  # pyright: ignore[reportArgumentType]
        jobs=jobs,
        timeout=timeout,
        options=options_by_backend(option),
    )
    if json_file is not None:
        check_target("--json", json_file)
    with terminable(), StepLine(verbose) as progress:
        result = run_benchmark(settings, progress)
    values = document(result)
    if json_file is not None:
        write_report("--json", json_file, encode(values))
    print_tables(values, Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH))
    for failure in result.failures:
        complain(failure)
    if verbose:
        print(*(record.traceback for record in result.records if record.traceback), sep="\n", file=sys.stderr)
    return FAILED if result.failures else 0


task_commands.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (sys.argv without one) and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(arguments, prog_name="gpa-bench", standalone_mode=False)
    except COMMAND_LINE_ERROR as error:
        # Without a command there is no message: the help has been shown.
        if message := error.format_message().rstrip("."):
            complain(f"{message}; see gpa-bench --help")
        return MISUSE
    except GpaError as error:
        if {"-v", "--verbose"} & set(arguments):
            traceback.print_exc()
        complain(str(error))
        return MISUSE
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        # Typer turns Ctrl-C into this status without a word.
        complain("interrupted; nothing was written")
    return int(status or 0)


if __name__ == "__main__":
    sys.exit(main())
