"""The commands accuracy, speed, memory and full of `gpa-bench`: one engine, the tasks of the Ascend report.

Exit status as everywhere in gpa-bench: 0 when everything was measured and the logits are within the limits of
their dtype, 1 when something failed, 2 for misuse.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gpa_conformance.bench.console import StepLine, check_target, complain, terminable, write_report

if TYPE_CHECKING:
    from gpa_conformance.bench.conditions import Conditions, EngineChoice, Outcome

FAILED = 1

PLAIN_WIDTH = 160
"""Columns of a table that goes into a file or pipe."""

Model = Annotated[str, typer.Option("--model", metavar="DIR", help="Checkpoint folder, hub id, demo or tiny-random.")]
Backend = Annotated[str, typer.Option("--backend", help="Inference engine.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Dtype of the engine, e.g. float32 or bfloat16.")]
Device = Annotated[str, typer.Option("--device", help="Device of the engine, e.g. cpu or cuda.")]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads.")]
Option = Annotated[
    list[str], typer.Option("--option", metavar="KEY=VALUE", help="Another option of the backend; repeat.")
]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Longest wait for one answer.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Progress line by line, and tracebacks.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the results go, as JSON.")]
Baseline = Annotated[
    Path | None,
    typer.Option("--baseline", metavar="FOLDER", help="A folder of gpa-conformance baseline, instead of torch here."),
]
Iterations = Annotated[int, typer.Option("--num-iters", help="Answers that are timed.")]
WarmUp = Annotated[int, typer.Option("--warm-up", help="Answers before them, not timed.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Tokens of every answer, exactly.")]
Prefill = Annotated[list[int], typer.Option("--prefill", help="Length of a prompt in tokens; repeat for several.")]


def register(app: typer.Typer) -> None:
    """Add the commands to gpa-bench."""
    for command in (accuracy, speed, memory, full):
        app.command()(command)


def accuracy(
    model: Model,
    backend: Backend = "torch",
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = 2,
    baseline: Baseline = None,
    output: Output = Path("results_accuracy.json"),
    option: Option = [],  # noqa: B006
    timeout: Timeout = 900.0,
    verbose: Verbose = False,
) -> int:
    """Logits of the Ascend report's eight prompts against torch in float32 on the CPU, with its table and verdicts."""
    from gpa_conformance.bench.accuracy import AccuracySettings, measure_accuracy
    from gpa_conformance.bench.task_tables import print_accuracy

    settings = AccuracySettings(None if baseline is None else str(baseline))
    choice = _choice(model, backend, dtype, device, threads, option, timeout)
    return _run(choice, lambda *at: measure_accuracy(at[0], settings, at[1]), {"": output}, print_accuracy, verbose)


def speed(
    model: Model,
    backend: Backend = "torch",
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = 2,
    num_iters: Iterations = 10,
    max_new_tokens: NewTokens = 128,
    warm_up: WarmUp = 2,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Text to continue, if not the report's first.")
    ] = None,
    output: Output = Path("results_benchmark.json"),
    option: Option = [],  # noqa: B006
    timeout: Timeout = 900.0,
    verbose: Verbose = False,
) -> int:
    """Throughput, latency (mean, median, p99, min, max), memory and load time of one warm request at a time."""
    from gpa_conformance.bench.prompts import report_prompts
    from gpa_conformance.bench.speed import SpeedSettings, measure_speed
    from gpa_conformance.bench.task_tables import print_speed

    text = report_prompts()[0].text if prompt is None else prompt
    settings = SpeedSettings(text, num_iters, max_new_tokens, warm_up)
    choice = _choice(model, backend, dtype, device, threads, option, timeout)
    return _run(choice, lambda *at: measure_speed(at[0], settings, at[1]), {"": output}, print_speed, verbose)


def memory(
    model: Model,
    backend: Backend = "torch",
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = 2,
    prefill: Prefill = [128, 512, 2048],  # noqa: B006
    max_new_tokens: NewTokens = 128,
    output: Output = Path("results_memory.json"),
    option: Option = [],  # noqa: B006
    timeout: Timeout = 900.0,
    verbose: Verbose = False,
) -> int:
    """What the engine holds once loaded, after prompts of several lengths, and after decoding."""
    from gpa_conformance.bench.footprint import MemorySettings, measure_memory
    from gpa_conformance.bench.task_tables import print_memory

    settings = MemorySettings(tuple(prefill), max_new_tokens)
    choice = _choice(model, backend, dtype, device, threads, option, timeout)
    return _run(choice, lambda *at: measure_memory(at[0], settings, at[1]), {"": output}, print_memory, verbose)


def full(
    model: Model,
    backend: Backend = "torch",
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = 2,
    baseline: Baseline = None,
    num_iters: Iterations = 10,
    max_new_tokens: NewTokens = 128,
    warm_up: WarmUp = 2,
    prefill: Prefill = [128, 512, 2048],  # noqa: B006
    output: Output = Path("eval_results.json"),
    option: Option = [],  # noqa: B006
    timeout: Timeout = 900.0,
    verbose: Verbose = False,
) -> int:
    """Accuracy, speed, memory and texts; all in one file, and each in its own results_*.json beside it."""
    from gpa_conformance.bench.accuracy import AccuracySettings
    from gpa_conformance.bench.footprint import MemorySettings
    from gpa_conformance.bench.full import PARTS, evaluate
    from gpa_conformance.bench.prompts import report_prompts
    from gpa_conformance.bench.speed import SpeedSettings
    from gpa_conformance.bench.task_tables import print_full

    settings = (
        AccuracySettings(None if baseline is None else str(baseline)),
        SpeedSettings(report_prompts()[0].text, num_iters, max_new_tokens, warm_up),
        MemorySettings(tuple(prefill), max_new_tokens),
    )
    choice = _choice(model, backend, dtype, device, threads, option, timeout)
    files = {"": output} | {key: output.parent / name for key, name in PARTS.items()}
    return _run(choice, lambda *at: evaluate(at[0], *settings, at[1]), files, print_full, verbose)


def _choice(
    model: str, backend: str, dtype: str, device: str, threads: int, option: list[str], timeout: float
) -> EngineChoice:
    from gpa_conformance.bench.conditions import EngineChoice
    from gpa_conformance.bench.options import options_of_one

    return EngineChoice(model, backend, dtype, device, threads, timeout, options_of_one(option))


def _run(
    choice: EngineChoice,
    task: Callable[[Conditions, StepLine], Outcome],
    files: dict[str, Path],
    show: Callable[[dict[str, Any], Console], None],
    verbose: bool,
) -> int:
    """Do a task, write and print what it found. files: the document's parts and where they go; "" is all of it."""
    from gpa_conformance.bench.conditions import Conditions
    from gpa_conformance.bench.report import encode

    for path in files.values():
        check_target("--output", path)
    with terminable(), StepLine(verbose) as progress:
        outcome = task(Conditions.begin(choice, progress), progress)
    for part, path in files.items():
        write_report("--output", path, encode(outcome.document[part] if part else outcome.document))
    show(outcome.document, Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH))
    for path in files.values():
        print(f"written: {path}", file=sys.stderr)
    for failure in outcome.failures:
        complain(failure)
    if verbose and outcome.traceback:
        print(outcome.traceback, file=sys.stderr)
    return FAILED if outcome.failures else 0
