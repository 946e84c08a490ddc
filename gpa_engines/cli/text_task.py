"""`gpa-run --task text`: check the command line, continue the prompt, hand over the text and its report."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpa_codecs.audio import check_writable
from gpa_codecs.errors import AudioError
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.checkpoint import Part
from gpa_engines.checkpoint.speech_domain import RELEASED
from gpa_engines.cli import usage
from gpa_engines.cli.execute import RANDOM_NOTE
from gpa_engines.cli.inputs import read_text
from gpa_engines.cli.options import RunOptions, flag
from gpa_engines.cli.output import print_json, print_line, write_text
from gpa_engines.cli.progress import Narrator
from gpa_engines.cli.report import versions
from gpa_engines.cli.text_report import FILE_NAME, engine_facts, machine_basics, text_document
from gpa_engines.cli.usage import UsageError
from gpa_engines.engine import Engine
from gpa_engines.hub import resolve_model
from gpa_engines.random_checkpoint import is_random_checkpoint
from gpa_engines.speech.loading import find_model, model_folder
from gpa_engines.speech.tasks import SamplingOverrides
from gpa_engines.text import Completion, complete, text_sampling

TEXT_PARTS: tuple[Part, ...] = ("lm", "tokenizer")
"""What plain text needs of a checkpoint."""

MEANINGFUL = {
    *("task", "prompt", "text_file", "model", "backend", "option", "tokenizer", "output", "stream", "json", "verbose"),
    *usage.ENGINE_OPTIONS,
    *usage.SERVER_OPTIONS,
    *SamplingOverrides.__annotations__,
}


@dataclass(frozen=True, slots=True)
class TextJob:
    """A command line that can run. tokenizer: a file or folder that replaces the checkpoint's. output: the report."""

    model: str
    backend: str
    engine_options: dict[str, Any]
    tokenizer: Path | None
    sampling: SamplingOverrides
    prompt: str
    output: Path
    stream: bool
    json: bool


def check_text(options: RunOptions) -> TextJob:
    """Read what the options name; raises GpaError for the first thing that is wrong with them."""
    given = options.given()
    for name in sorted(given - MEANINGFUL):
        advice = "the prompt is --prompt" if name == "text" else "leave it out"
        raise UsageError(f"{flag(name)} means nothing with --task text; {advice}")
    if not given & {"prompt", "text_file"}:
        raise UsageError("--task text needs a prompt: --prompt TEXT or --text-file FILE (- reads standard input)")
    if {"prompt", "text_file"} <= given:
        raise UsageError("both --prompt and --text-file were given; a run has one prompt")
    sampling = usage.sampling(options, None)
    text_sampling(sampling)
    job = TextJob(
        model=usage.model_name(options.model),
        backend=usage.backend(options),
        engine_options=usage.engine_options(options),
        tokenizer=_tokenizer(options.tokenizer),
        sampling=sampling,
        prompt="",
        output=_report_file(options.output),
        stream=options.stream,
        json=options.json,
    )
    source, prompt = read_text(options.prompt, options.text_file, "--prompt")
    if not prompt:
        raise UsageError(f"{source} is empty; expected a prompt of at least one character")
    return replace(job, prompt=prompt)


def execute_text(job: TextJob, narrator: Narrator) -> None:
    """Continue the prompt; the text goes to standard output, the report into its file. Raises GpaError."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    path = resolve_model(job.model, progress=narrator.say)
    model_dir = model_folder(path)
    random_weights = is_random_checkpoint(model_dir)
    if random_weights:
        narrator.note(RANDOM_NOTE)
    files = find_model(path, backend=job.backend, parts=TEXT_PARTS, tokenizer=job.tokenizer)
    narrator.say(str(files.choice))
    if files.domain is not None:
        narrator.warn([f"{files.domain.summary}, and has not learned to write; for text use --model {RELEASED}"])
    space = files.checkpoint.token_space()
    narrator.stage("loading the model")
    started = time.perf_counter()
    engine = files.load_engine(space, job.engine_options)
    load = time.perf_counter() - started
    info = engine.info
    narrator.say(f"{info.backend} on {info.device} in {info.dtype}, loaded in {load:.1f} s")
    if warning := info.seed_warning(text_sampling(job.sampling)):
        narrator.warn([warning])
    completion = asyncio.run(_generate(engine, space, job, narrator))
    narrator.rest()
    narrator.say(summary(completion))
    document = text_document(
        created=created,
        model=job.model,
        model_dir=path,
        random_weights=random_weights,
        engine=engine_facts(info),
        options=job.engine_options,
        sampling=text_sampling(job.sampling),
        machine=machine_basics(),
        versions=versions(info.backend),
        load=load,
        results=[completion.as_dict()],
    )
    write_text(job.output, json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    if job.json:
        print_json({"event": "result", **document} if job.stream else document, one_line=job.stream)
    elif not job.stream:
        print_line(completion.text)


def summary(completion: Completion) -> str:
    """The run in one line."""
    usage = completion.usage
    tokens = f"{usage.new_tokens} tokens"
    if usage.new_tokens > 1 and usage.decode > 0:
        tokens += f" at {(usage.new_tokens - 1) / usage.decode:.1f} tok/s"
    return f"{tokens}, {completion.total:.2f} s of work, ended by {completion.finish_reason}, seed {usage.seed}"


async def _generate(engine: Engine, space: TokenSpace, job: TextJob, narrator: Narrator) -> Completion:
    shown_here = job.stream and sys.stdout.isatty()

    def tell(tokens: int) -> None:
        if not shown_here:
            narrator.stage("writing", f"{tokens} tokens" if tokens else "")

    async with _closed_at_the_end(engine):
        stream = complete(engine, space, job.prompt, progress=tell, **job.sampling)
        tell(0)
        async with aclosing(stream):
            async for part in stream:
                if job.stream:
                    narrator.rest()
                    _show(part, job)
        if job.stream and not job.json:
            print_line("")
        return stream.result


def _show(part: str, job: TextJob) -> None:
    if job.json:
        print_json({"event": "text", "text": part}, one_line=True)
    else:
        print_line(part, end="")


@asynccontextmanager
async def _closed_at_the_end(engine: Engine) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await engine.close()


def _tokenizer(path: str | None) -> Path | None:
    if path is not None and not Path(path).exists():
        raise UsageError(f"--tokenizer: {path}: there is no such file or folder")
    return None if path is None else Path(path)


def _report_file(path: str | None) -> Path:
    if path == "-":
        raise UsageError("--output - : standard output belongs to the text; --json prints the report instead")
    try:
        check_writable(path or FILE_NAME)
    except AudioError as error:
        raise UsageError(f"--output: {error}") from error
    return Path(path or FILE_NAME)
