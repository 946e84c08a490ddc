"""`gpa-run fingerprint`: what a model answers to fixed prompts, for servers to be compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from gpa_engines.cli.options import MODEL_VARIABLE


@dataclass(frozen=True, slots=True)
class FingerprintOptions:
    """The command line as typed."""

    model: str | None
    backend: str | None
    dtype: str | None
    output: str | None
    verbose: bool


def fingerprint(
    model: Annotated[
        str | None, Option("--model", metavar="NAME", help=f"Folder or AutoArk-AI/GPA; or set {MODEL_VARIABLE}.")
    ] = None,
    backend: Annotated[
        str | None,
        Option("--backend", metavar="NAME", help="Engine that is asked (torch).", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        Option("--dtype", metavar="NAME", help="It computes in (of torch float32).", show_default=False),
    ] = None,
    output: Annotated[
        str | None,
        Option("--output", "-o", metavar="FILE", help="Instead of MODEL/fingerprint.json.", show_default=False),
    ] = None,
    verbose: Annotated[bool, Option("--verbose", "-v", metavar=" ", help="Tracebacks of errors.")] = False,
) -> FingerprintOptions:
    """Record what a checkpoint answers to four fixed prompts: the 20 likeliest ids of each, and their scores.

    --backend remote compares every server with MODEL/fingerprint.json, and refuses one that has other weights. So a
    machine that only talks to servers needs no weights to recognise them.
    """
    return FingerprintOptions(model, backend, dtype, output, verbose)


def record(options: FingerprintOptions) -> int:
    """Write the file, print its path and return the exit status. Raises GpaError."""
    from gpa_codecs.files import why_not_writable
    from gpa_engines.cli.output import print_line
    from gpa_engines.cli.usage import UsageError, model_name
    from gpa_engines.fingerprint import FILE, Fingerprint
    from gpa_engines.speech.loading import find_model

    backend = options.backend or "torch"
    files = find_model(model_name(options.model), backend=backend, parts=("tokenizer", "lm"))
    path = Path(options.output) if options.output is not None else files.checkpoint.root / FILE
    if reason := why_not_writable(path):
        raise UsageError(f"--output: {path}: {reason}")
    dtype = options.dtype or ("float32" if backend == "torch" else None)
    found = Fingerprint.of_model(backend, files.engine, {} if dtype is None else {"dtype": dtype})
    found.write(path)
    print_line(str(path))
    return 0
