"""A process that measures: reads one JSON request a line on standard input, answers each with one JSON line.

The first line says what to be, `{"role": ..., "settings": {...}}`; every further one is `{"call": ..., "arguments":
{...}}`. Answers are `{"result": {...}, "idle_cpu_s": ...}` or `{"error": ..., "traceback": ...}`; idle_cpu_s is the CPU
time that the process used since its last answer. End of input ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

from gpa_codecs.errors import GpaError


class Role(Protocol):
    """Something whose methods take JSON values and return JSON objects."""

    def close(self) -> dict[str, Any]: ...


def main() -> None:
    requests, answers = sys.stdin, _private_stdout()
    first = json.loads(requests.readline())
    role: Role | None = None

    def become() -> dict[str, Any]:
        nonlocal role
        role = ROLES[first["role"]](first["settings"])
        return {}

    _answer(answers, _attempt(become) | {"idle_cpu_s": 0.0})
    if role is None:
        return
    try:
        ended = time.process_time()
        for line in requests:
            idle = time.process_time() - ended
            request = json.loads(line)
            call = partial(getattr(role, request["call"]), **request["arguments"])
            _answer(answers, _attempt(call) | {"idle_cpu_s": idle})
            ended = time.process_time()
    finally:
        role.close()


def _private_stdout() -> TextIO:
    """The pipe to the parent, with descriptor 1 pointed at standard error so that no library's print gets into it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"result": call()}
    except GpaError as error:
        return {"error": str(error), "traceback": traceback.format_exc()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _contender(settings: dict[str, Any]) -> Role:
    from gpa_conformance.bench.contenders import Contender
    from gpa_conformance.bench.workload import ContenderSpec, Workload

    return Contender(
        ContenderSpec(**settings["spec"]),
        Path(settings["model"]),
        Workload(**settings["workload"]),
        settings["vocab_size"],
        range(*settings["semantic"]),
    )


def _codec_stage(settings: dict[str, Any]) -> Role:
    from gpa_conformance.bench.codec import CodecStage

    return CodecStage(**settings)


def _speech_job(settings: dict[str, Any]) -> Role:
    from gpa_conformance.bench.jobs import SpeechJob

    return SpeechJob(**settings)


def _subject(settings: dict[str, Any]) -> Role:
    from gpa_conformance.bench.subject import Subject
    from gpa_conformance.bench.workload import ContenderSpec

    sizes = {name: settings[name] for name in ("prompt_tokens", "new_tokens")}
    return Subject(ContenderSpec(**settings["spec"]), Path(settings["model"]), **sizes)


ROLES: dict[str, Callable[[dict[str, Any]], Role]] = {
    "contender": _contender,
    "codec": _codec_stage,
    "job": _speech_job,
    "subject": _subject,
}

if __name__ == "__main__":
    main()
