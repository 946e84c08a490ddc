"""`gpa-run`: from the command line to an exit status.

0: done. 1: a defect, or `doctor` found something wrong. 2: the command line, a file or the environment is wrong; one
message says how. 130: Ctrl-C. 141: whoever read standard output went away.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, cast

import typer
from typer.core import TyperGroup

import gpa_engines
from gpa_codecs.errors import GpaError
from gpa_engines.cli.doctor import DoctorOptions, doctor, examine
from gpa_engines.cli.fingerprint import FingerprintOptions, fingerprint, record
from gpa_engines.cli.options import RunOptions, expand_dash, normalize, signature
from gpa_engines.demo import demo_claims

COMMAND_LINE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
"""The base of everything that typer says about a command line; which module it lives in depends on typer's version."""

DEFECT = 1
WRONG_INPUT = 2
INTERRUPTED = 130
PIPE_CLOSED = 141

EPILOG = """
[bold]Examples[/bold]

gpa-run --task tts-a --ref-audio example:voice --text "three one four" -o hello.wav

gpa-run --task stt --src-audio hello.wav

gpa-run --task tts-a --model AutoArk-AI/GPA --ref-audio someone.wav --text "Hello there." -o hello.wav

gpa-run --task vc --model DIR --src-audio talk.flac --ref-audio other.wav -o converted.wav

gpa-run --ref-audio clip.wav --save-voice ann.json --model DIR

echo "Piped text." | gpa-run --task tts-a --voice ann.json --model DIR --stream -o - | aplay

gpa-run --task text --model DIR --prompt "Once upon a time" --stream

gpa-run doctor --model DIR

[bold]Without --model[/bold]

The demo checkpoint that comes with the package is used. It knows spoken digits, and was measured:

"""
EPILOG += "\n\n".join(demo_claims())


class _Group(TyperGroup):
    """The options of a run, a `-` that stands for --text-file -, and the subcommands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        valued = {name for option in self.params if not option.is_flag for name in option.opts}  # pyright: ignore
        return super().parse_args(ctx, expand_dash(args, valued))


app = typer.Typer(
    name="gpa-run",
    cls=_Group,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"token_normalize_func": normalize, "help_option_names": ["--help", "-h"]},
)


@app.callback(
    invoke_without_command=True,
    options_metavar="--task stt|tts-a|vc|text [OPTIONS]",
    subcommand_metavar="| doctor | fingerprint",
    epilog=EPILOG,
)
def _run(**options: Any) -> RunOptions:
    """Transcribe (stt), speak (tts-a), convert voices (vc) and continue text (text) with a GPA checkpoint.

    Standard output gets the result: the text, or the path of the audio file. Standard error gets the rest.
    Files may be named example:speech and example:voice, clips that come with the package, or - for standard input.
    """
    return RunOptions(**options)


# typer reads the options from here, so that they are declared once, where their values arrive.
_run.__signature__ = signature()  # pyright: ignore[reportFunctionMemberAccess]
_run.__annotations__ = {}

app.command(name="doctor")(doctor)
app.command(name="fingerprint")(fingerprint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (sys.argv without one) and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _guarded(arguments)
    except KeyboardInterrupt:
        status = _interrupted()
    _settle_stdout()
    return status


def _guarded(arguments: Sequence[str]) -> int:
    verbose = False
    try:
        command = app(arguments or ["--help"], prog_name="gpa-run", standalone_mode=False)
        if not isinstance(command, RunOptions | DoctorOptions | FingerprintOptions):
            return int(command or 0)
        verbose = command.verbose
        if isinstance(command, DoctorOptions):
            return examine(command)
        return record(command) if isinstance(command, FingerprintOptions) else _run_or_list(command)
    except COMMAND_LINE_ERROR as error:
        return _complain(f"{error.format_message().rstrip('.')}; see gpa-run --help")
    except GpaError as error:
        return _complain(str(error), verbose)
    except BrokenPipeError:
        return PIPE_CLOSED
    except Exception as error:
        hint = "" if verbose else " (run with -v for the traceback)"
        _complain(f"unexpected {type(error).__name__}: {error}{hint}", verbose)
        return DEFECT


def _run_or_list(options: RunOptions) -> int:
    if options.version:
        print(f"gpa-engines {gpa_engines.__version__}")
        return 0
    if options.list_backends:
        from gpa_engines.cli.backends import print_backends

        print_backends(options.json)
        return 0
    from gpa_engines.cli.progress import Narrator

    if options.task == "text":
        from gpa_engines.cli.text_task import check_text, execute_text

        text_job = check_text(options)
        with Narrator(options.verbose) as narrator:
            execute_text(text_job, narrator)
        return 0
    from gpa_engines.cli.inputs import check

    job = check(options)
    from gpa_engines.cli.execute import execute

    with Narrator(options.verbose) as narrator:
        execute(job, narrator)
    return 0


def _complain(message: str, with_traceback: bool = False) -> int:
    from rich.console import Console
    from rich.text import Text

    if with_traceback:
        traceback.print_exc()
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    return WRONG_INPUT


def _interrupted() -> int:
    """From here on another Ctrl-C kills at once.

    A codec call cannot be cut short, and torch aborts the process if its thread outlives the interpreter: the exit
    does not wait for either.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("interrupted", file=sys.stderr, flush=True)
    if threading.active_count() > 1:
        _settle_stdout()
        os._exit(INTERRUPTED)
    return INTERRUPTED


def _settle_stdout() -> None:
    """Keep the interpreter from complaining at its end that standard output cannot be flushed; it was said already."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
