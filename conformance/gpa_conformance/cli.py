"""`gpa-conformance`: exit status 0 if all that ran passed and something ran, 1 for failed cases, 2 for misuse, 130
after Ctrl-C.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from gpa_codecs.errors import GpaError
from gpa_codecs.files import write_atomically
from gpa_conformance.baseline import Baseline
from gpa_conformance.cases import Case, load_cases, select
from gpa_conformance.known_failures import read_known_failures
from gpa_conformance.limits import load_limits
from gpa_conformance.preparation import (
    baseline_folder,
    check_outputs,
    check_reference,
    check_utterances,
    find_codec,
    make_baseline,
    open_checkpoint,
)
from gpa_conformance.progress import RunProgress
from gpa_conformance.results import RunReport
from gpa_conformance.runner import run_cases
from gpa_conformance.session import Setup
from gpa_conformance.speech.material import UTTERANCES
from gpa_conformance.target import make_target
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.checkpoint.speech_domain import find_speech_domain
from gpa_engines.engine_options import parse_options

FAILED, MISUSE, INTERRUPTED = 1, 2, 130

PLAIN_WIDTH = 120
"""Columns of a table that goes into a file or pipe."""

app = typer.Typer(
    name="gpa-conformance",
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

_Model = Annotated[str, typer.Option(metavar="DIR", help="Checkpoint folder, hub id, demo or tiny-random.")]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks of errors.")]
_Cases = Annotated[str | None, typer.Option(metavar="A,B", help="Families or case ids, e.g. logits,contract/stop.")]
_Threads = Annotated[int | None, typer.Option(metavar="N", help="CPU threads (as the backend chooses).")]
_Utterances = Annotated[int, typer.Option(metavar="N", help="Held-out recordings that the family speech takes.")]
_Markdown = Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write it for a pull request.")]
_Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as one page with plots.")]


@app.callback()
def _about() -> None:
    """Prove that an engine is the same model as every other one."""


@app.command()
def run(
    model: _Model,
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="Engine of this package.")] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="MODULE:FACTORY", help="Anyone's engine: factory(model_dir, **options).")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Answers to compare with (made first where torch is).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="Given to the engine.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="Given to the engine.")] = None,
    threads: _Threads = None,
    option: Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="Another option of the engine; repeat.")] = [],  # noqa: B006
    cases: _Cases = None,
    codec: Annotated[
        str | None,
        typer.Option(
            metavar="torch|onnx|MODULE:FACTORY", help="Test this codec: factory(bicodec_dir, glm_dir) (as installed)."
        ),
    ] = None,
    limits: Annotated[Path | None, typer.Option(metavar="FILE", help="Other limits than the package's.")] = None,
    limits_as: Annotated[str | None, typer.Option(metavar="DTYPE", help="Use the limits of this dtype.")] = None,
    known_failures: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A case id and a reason per line.")
    ] = None,
    isolate: Annotated[bool, typer.Option(help="Own process for the engine: it may crash or hang.")] = True,
    case_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Time limit of every case (by family: 5 to 15 minutes).")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Added to the seeds of sampled cases.")] = 0,
    utterances: _Utterances = UTTERANCES,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything found.")] = None,
    markdown: _Markdown = None,
    html: _Html = None,
    verbose: _Verbose = False,
) -> int:
    """Run the cases on one engine and compare with the baseline.

    Ctrl-C ends the run; the files that were asked for then hold the cases that had ended.
    """
    from gpa_conformance.report import terminal

    files = {"--json": json_file, "--markdown": markdown, "--html": html}
    check_outputs(files)
    if case_timeout is not None and not case_timeout > 0:
        raise GpaError(f"--case-timeout is {case_timeout:g}; expected seconds above 0")
    check_utterances("--utterances", utterances)
    packaged = load_cases()
    chosen = select(packaged, cases)
    known = {} if known_failures is None else read_known_failures(known_failures, {case.id for case in packaged})
    limit_sets = load_limits(limits)
    if limits_as is not None:
        limit_sets.for_dtype(limits_as)
    checkpoint, problem = open_checkpoint(model)
    named = {"dtype": dtype, "device": device, "threads": threads}
    options = {name: value for name, value in named.items() if value is not None}
    given = parse_options(option, {name: f"--{name}" for name in named})
    target = make_target(checkpoint.root, backend=backend, engine=engine, options=options | given)
    make_codec, no_codec = find_codec(checkpoint, problem, codec)
    domain = find_speech_domain(checkpoint.root)

    async def carry_out(folder: Path, progress: RunProgress) -> RunReport:
        setup = Setup(
            target=target,
            baseline=await _baseline(
                checkpoint, problem, folder, baseline is None, chosen, threads, utterances, progress
            ),
            limits=limit_sets,
            cases={case.id: case for case in packaged},
            space=checkpoint.token_space(),
            make_codec=make_codec,
            no_codec=no_codec,
            isolate=isolate,
            limits_as=limits_as,
            case_timeout=case_timeout,
            known=known,
            seed=seed,
            domain=domain,
            utterances=utterances,
        )
        return await run_cases(
            setup, checkpoint, chosen, command=_command(), progress=progress.case, on_interrupt=interrupted.append
        )

    interrupted: list[RunReport] = []
    try:
        with baseline_folder(baseline) as folder, RunProgress() as progress:
            report = asyncio.run(carry_out(folder, progress))
    except KeyboardInterrupt:
        if not interrupted or not any(files.values()):
            raise
        written = _write_report(interrupted[0], files) == 0
        left = f"; reported are the cases that had ended, {interrupted[0].unreached} of {len(chosen)} had not"
        raise _Interrupted("interrupted" + (left if written else "")) from None
    terminal.show(report, _stdout())
    return _write_report(report, files) or report.exit_code


@app.command("baseline")
def make_baseline_folder(
    model: _Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the baseline.")],
    cases: _Cases = None,
    threads: _Threads = None,
    codec: Annotated[bool, typer.Option(help="Record the codec, and the cases whose prompts need it.")] = True,
    utterances: _Utterances = UTTERANCES,
    verbose: _Verbose = False,
) -> int:
    """Record the answers of the reference: torch, CPU, float32."""
    check_reference("making a baseline")
    check_utterances("--utterances", utterances)
    chosen = select(load_cases(), cases)
    checkpoint, problem = open_checkpoint(model)
    open_codec, reason = find_codec(checkpoint, problem, None) if codec else (None, "--no-codec")
    with RunProgress() as progress:
        done = asyncio.run(
            make_baseline(
                checkpoint,
                out,
                open_codec,
                chosen,
                threads=threads,
                progress=progress.baseline,
                utterances=utterances,
            )
        )
    recorded, omitted = done.document["cases"], done.document["omitted"]
    console = _stdout()
    amount = "1 case" if len(recorded) == 1 else f"{len(recorded)} cases"
    console.print(f"{out}: {amount} of {checkpoint.root.resolve().name}", soft_wrap=True)
    if omitted:
        why = f"; {reason}" if open_codec is None else ""
        console.print(
            f"{len(omitted)} cases are left out: {'; '.join(sorted(set(omitted.values())))}{why}", soft_wrap=True
        )
    return 0


@app.command()
def compare(
    reports: Annotated[list[Path], typer.Argument(metavar="A.json B.json ...", help="What run --json wrote.")],
    markdown: _Markdown = None,
    html: _Html = None,
    verbose: _Verbose = False,
) -> int:
    """Put the reports of several runs side by side: backend x dtype x case."""
    from gpa_conformance.report import matrix

    check_outputs({"--markdown": markdown, "--html": html})
    read = [RunReport.from_json(path) for path in reports]
    matrix.show(read, _stdout())
    return _write({"--markdown": (markdown, matrix.markdown), "--html": (html, matrix.html)}, read)


@app.command("cases")
def list_cases(
    names: Annotated[list[str] | None, typer.Argument(metavar="[CASE or FAMILY]", help="Explain these.")] = None,
    verbose: _Verbose = False,
) -> int:
    """List the cases, or explain some: what they do, what they catch."""
    cases = load_cases()
    console = _stdout()
    if not names:
        width = max(len(case.id) for case in cases)
        for case in cases:
            console.print(f"{case.id:{width}}  {case.title}", soft_wrap=True)
        return 0
    for case in select(cases, ",".join(names)):
        console.print(Text(case.id, style="bold"), Text(case.title))
        console.print(Text(f"  {case.explanation}"), soft_wrap=True)
        rest = {key: value for key, value in case.spec.items() if key != "kind"}
        console.print(Text(f"  {case.kind}: {json.dumps(rest, ensure_ascii=False)}", style="dim"), soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (sys.argv without one) and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(arguments, prog_name="gpa-conformance", standalone_mode=False)
    except typer.TyperException as error:
        _complain(f"{error.format_message().rstrip('.')}; see gpa-conformance --help")
        return MISUSE
    except _Interrupted as error:
        _complain(str(error))
        return INTERRUPTED
    except GpaError as error:
        if {"-v", "--verbose"} & set(arguments):
            traceback.print_exc()
        _complain(str(error))
        return MISUSE
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        # Typer turns Ctrl-C into this status without a word.
        _complain("interrupted; nothing was written")
    return int(status or 0)


class _Interrupted(Exception):
    """Ctrl-C in a run of which there was something to keep."""


async def _baseline(
    checkpoint: Checkpoint,
    problem: str,
    folder: Path,
    make: bool,
    cases: Sequence[Case],
    threads: int | None,
    utterances: int,
    progress: RunProgress,
) -> Baseline:
    """The given baseline, or one that is made of the chosen cases."""
    if not make:
        baseline = Baseline.open(folder)
        baseline.check_model(checkpoint)
        return baseline
    open_codec, _ = find_codec(checkpoint, problem, None)
    return await make_baseline(
        checkpoint,
        folder,
        open_codec,
        cases,
        threads=threads,
        progress=progress.baseline,
        utterances=utterances,
    )


def _write_report(report: RunReport, files: Mapping[str, Path | None]) -> int:
    """Write those that have a path; MISUSE if one could not be written, the others are."""
    from gpa_conformance.report import html as html_report
    from gpa_conformance.report import markdown as markdown_report

    renderers: dict[str, Callable[[Any], str]] = {
        "--json": lambda given: json.dumps(given.to_dict(), indent=1, ensure_ascii=False) + "\n",
        "--markdown": markdown_report.render,
        "--html": html_report.render,
    }
    return _write({option: (path, renderers[option]) for option, path in files.items()}, report)


def _write(outputs: dict[str, tuple[Path | None, Callable[[Any], str]]], value: Any) -> int:
    """Write every output that has a path; MISUSE if one could not be written, the others are."""
    status = 0
    for option, (path, render) in outputs.items():
        if path is None:
            continue
        try:
            write_atomically(path.resolve(), render(value).encode())
        except OSError as error:
            _complain(f"{option} {path}: cannot be written: {error.strerror or error}")
            status = MISUSE
    return status


def _command() -> list[str]:
    """What was typed, without the folder of the program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _stdout() -> Console:
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def _complain(message: str) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
