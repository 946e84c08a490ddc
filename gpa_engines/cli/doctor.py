"""`gpa-run doctor`: what a checkpoint folder holds, what is wrong with it, and which tasks it can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from typer import Option

from gpa_engines.cli.options import MODEL_VARIABLE

if TYPE_CHECKING:
    from rich.console import Console

    from gpa_engines.checkpoint import CheckpointReport
    from gpa_engines.conversions import Conversion

SCHEMA = "gpa-doctor/1"

WRONG = 1
"""Exit status when a task cannot run."""


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """The command line as typed."""

    model: str | None
    bicodec: str | None
    glm_tokenizer: str | None
    tokenizer: str | None
    json: bool
    verbose: bool


def doctor(
    model: Annotated[
        str | None,
        Option(
            "--model",
            metavar="NAME",
            help=f"Folder, AutoArk-AI/GPA, demo or tiny-random; or set {MODEL_VARIABLE} (demo).",
        ),
    ] = None,
    bicodec: Annotated[
        str | None, Option("--bicodec", metavar="DIR", help="BiCodec, if not MODEL/BiCodec.", show_default=False)
    ] = None,
    glm_tokenizer: Annotated[
        str | None, Option("--glm-tokenizer", metavar="DIR", help="If not MODEL/glm-4-voice-tokenizer.")
    ] = None,
    tokenizer: Annotated[
        str | None, Option("--tokenizer", metavar="PATH", help="tokenizer.json, if not MODEL's.")
    ] = None,
    json: Annotated[bool, Option("--json", metavar=" ", help="The findings as a JSON document.")] = False,
    verbose: Annotated[
        bool, Option("--verbose", "-v", metavar=" ", help="Every check and control token; tracebacks of errors.")
    ] = False,
) -> DoctorOptions:
    """Check a checkpoint and explain it: parts, sizes, dtypes, token offsets, and what is missing.

    Conversions beside it (GGUF files, ONNX exports) are listed, and stand in for parts that are missing. No weights are
    loaded. Exit status 0 means that every task can run, 1 that something is wrong.
    """
    return DoctorOptions(model, bicodec, glm_tokenizer, tokenizer, json, verbose)


def examine(options: DoctorOptions) -> int:
    """Print the findings about a checkpoint and return the exit status. Raises GpaError if there is none to look at."""
    from gpa_engines.checkpoint import inspect_checkpoint
    from gpa_engines.cli.backends import stdout_console
    from gpa_engines.cli.output import print_json
    from gpa_engines.cli.usage import model_name
    from gpa_engines.conversions import find_conversions
    from gpa_engines.hub import resolve_model
    from gpa_engines.speech.loading import model_folder

    path = resolve_model(model_name(options.model))
    root = model_folder(path)
    report = inspect_checkpoint(
        root,
        bicodec=options.bicodec,
        glm_tokenizer=options.glm_tokenizer,
        tokenizer=options.tokenizer,
    )
    conversions = find_conversions(root)
    missing = _still_missing(report, conversions)
    if options.json:
        found = [conversion.as_dict() for conversion in conversions]
        tasks = [task for task, parts in missing.items() if not parts]
        print_json({"schema": SCHEMA, **report.as_dict(), "conversions": found, "missing": missing, "tasks": tasks})
    else:
        _show(report, conversions, missing, stdout_console(), options.verbose)
    damaged = any(conversion.problem for conversion in conversions)
    return WRONG if damaged or any(missing.values()) else 0


def _still_missing(report: CheckpointReport, conversions: Sequence[Conversion]) -> dict[str, list[str]]:
    """Per task the parts that neither the checkpoint nor a conversion has."""
    from gpa_engines.checkpoint import TASK_PARTS
    from gpa_engines.checkpoint.layout import PART_NAMES

    def replaced(task: str, name: str) -> bool:
        parts = {part for each in conversions if task in each.tasks for part in each.parts}
        return any(PART_NAMES[part] == name for part in parts if part in TASK_PARTS[task])

    return {task: [name for name in names if not replaced(task, name)] for task, names in report.missing.items()}


def _show(
    report: CheckpointReport,
    conversions: Sequence[Conversion],
    missing: Mapping[str, Sequence[str]],
    console: Console,
    verbose: bool,
) -> None:
    _line(console, f"checkpoint {report.root}", "bold")
    if report.components:
        _show_parts(report, console, verbose)
    if report.families:
        _show_tokens(report, console, verbose)
    if conversions:
        _show_conversions(conversions, console)
    _show_findings(report, conversions, missing, console, verbose)
    _show_tasks(missing, console)


def _show_parts(report: CheckpointReport, console: Console, verbose: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part")
    table.add_column("folder")
    table.add_column("size", justify="right")
    table.add_column("values", justify="right")
    table.add_column("dtypes")
    for component in report.components:
        values = "" if component.parameters is None else _count(component.parameters)
        row = (component.name, component.folder, _bytes(component.size), values, ", ".join(component.dtypes))
        table.add_row(*map(Text, row))
    console.print()
    console.print(table)
    console.print()
    for component in report.components:
        details = [f"{key} {value}" for key, value in component.details.items()]
        if verbose and component.key_style:
            details.append(f"names with {component.key_style}")
        if details:
            _line(console, f"{component.name}: ", "bold", ", ".join(details))


def _show_tokens(report: CheckpointReport, console: Console, verbose: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tokens")
    for column in ("count", "first id", "last id"):
        table.add_column(column, justify="right")
    for family in report.families:
        ids = family.range
        table.add_row(Text(f"<|{family.name}_N|>"), str(family.size), str(ids.start), str(ids.stop - 1))
    console.print()
    console.print(table)
    if verbose:
        _line(console, "control: " + ", ".join(f"{name} {token}" for name, token in report.control.items()))


def _show_conversions(conversions: Sequence[Conversion], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("also here")
    table.add_column("size", justify="right")
    table.add_column("what")
    for conversion in conversions:
        table.add_row(Text(conversion.path), Text(_bytes(conversion.size)), Text(conversion.content))
    console.print()
    console.print(table)


def _show_findings(
    report: CheckpointReport,
    conversions: Sequence[Conversion],
    missing: Mapping[str, Sequence[str]],
    console: Console,
    verbose: bool,
) -> None:
    """An error about a part that a conversion stands in for, in every task, is shown as a warning."""
    from gpa_engines.checkpoint.layout import PART_NAMES

    lacking = {name for names in missing.values() for name in names}
    styles = {"ok": "green", "warning": "yellow", "error": "bold red"}
    passed = sum(finding.level == "ok" for finding in report.findings)
    checked = sum(finding.level != "warning" for finding in report.findings)
    console.print()
    _line(console, f"{passed} of {checked} checks passed")
    said = set()
    for finding in report.findings:
        if finding.text in said or (finding.level == "ok" and not verbose):
            continue
        text, level = finding.text, finding.level
        if level == "ok":
            text += f" ({finding.file})"
        elif level == "error" and PART_NAMES[finding.part] not in lacking:
            text, level = f"{text} (a conversion stands in for it)", "warning"
        _line(console, f"{level}: ", styles[level], text)
        if finding.level != "ok":
            said.add(finding.text)
    for conversion in conversions:
        if conversion.problem:
            _line(console, "error: ", styles["error"], conversion.problem)


def _show_tasks(missing: Mapping[str, Sequence[str]], console: Console) -> None:
    console.print()
    for task, parts in missing.items():
        if parts:
            _line(console, f"{task:6}", "bold", f"cannot run: see the errors about {' and '.join(parts)}")
        else:
            _line(console, f"{task:6}", "bold", "can run")


def _line(console: Console, start: str, style: str = "", rest: str = "") -> None:
    from rich.text import Text

    console.print(Text.assemble((start, style), rest), soft_wrap=not console.is_terminal)


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _count(values: int) -> str:
    return f"{values / 1e6:.2f} M"
