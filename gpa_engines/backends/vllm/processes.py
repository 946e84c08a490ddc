"""The processes that vLLM starts: their environment, where their output goes, and what of it explains a failure."""

from __future__ import annotations

import logging
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gpa_engines.backends.vllm.settings import Settings, default_threads

LEVEL = "VLLM_LOGGING_LEVEL"
"""vLLM's own variable: who sets it gets what its processes print on standard error."""

LAST_LINES = 3
LONGEST_LINE = 400

_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Exit)\b.*|.*\b(?:terminate called|Fatal|Killed)\b.*")
_LOG_PREFIX = re.compile(r"^\s*(?:\([^)]*\)\s*)*(?:(?:ERROR|CRITICAL|WARNING|INFO)\s+[\d-]+\s+[\d:]+\s+\[[^\]]*\]\s*)?")
_OF_NO_USE = (
    "RuntimeError: Engine core initialization failed",
    "Exception: WorkerProc initialization failed",
    "RuntimeError: Worker failed with error",
)
"""What vLLM's outer processes say of a failure of an inner one."""

_OUR_OWN = "gpa_codecs.errors.BackendError: "


class Workspace:
    """A temporary folder with what vLLM's processes need and print; gone when it is closed or forgotten."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gpa-vllm-")
        folder = Path(self._folder.name)
        self.generation_config = folder / "generation"
        self.generation_config.mkdir()
        (self.generation_config / "generation_config.json").write_text("{}", encoding="utf-8")
        self._printed = folder / "printed.txt"
        self._launcher = folder / "launch"
        output = "-" if os.environ.get(LEVEL) else str(self._printed)
        launch = (sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")), output, sys.executable)
        self._launcher.write_text(f'#!/bin/sh\nexec {shlex.join(launch)} "$@"\n', encoding="utf-8")
        self._launcher.chmod(0o700)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Python's own multiprocessing starts its processes through the launcher meanwhile."""
        # The tracker of shared memory serves the whole program, so it must not be tied to one engine. It cleans up
        # behind processes that were killed, and would complain of that on standard error.
        with environment({"PYTHONWARNINGS": "ignore:resource_tracker:UserWarning"}):
            multiprocessing.resource_tracker.ensure_running()
        before = multiprocessing.spawn.get_executable()
        multiprocessing.spawn.set_executable(str(self._launcher))
        try:
            yield
        finally:
            multiprocessing.spawn.set_executable(before or sys.executable)

    def explanation(self) -> str:
        """The last errors that the processes have printed, or where their output went."""
        if os.environ.get(LEVEL):
            return "the cause is in what vLLM printed above"
        try:
            text = self._printed.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "its processes printed nothing"
        return explain(text) or f"its processes printed no error; set {LEVEL}=INFO to see everything"

    def close(self) -> None:
        self._folder.cleanup()


def explain(printed: str) -> str:
    """The last different lines that name an error, the innermost process's cause rather than what is said of it."""
    lines = (_LOG_PREFIX.sub("", line).strip()[:LONGEST_LINE] for line in printed.splitlines())
    errors = [line for line in lines if _ERROR.match(line)]
    telling = [line.removeprefix(_OUR_OWN) for line in errors if not line.startswith(_OF_NO_USE)]
    return " | ".join([*dict.fromkeys((telling or errors)[::-1])][:LAST_LINES][::-1])


@contextmanager
def importing() -> Iterator[None]:
    """vLLM is imported into this process meanwhile: nothing that it logs goes to standard output."""
    # Some of it is logged before vLLM sets up its logging.
    quieten()
    stream = os.environ.get("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    with environment({"VLLM_LOGGING_STREAM": stream, LEVEL: os.environ.get(LEVEL) or "CRITICAL"}):
        yield


def quieten() -> None:
    """vLLM logs no errors of this process, since they are raised; who sets vLLM's own level gets what he asks for."""
    if not os.environ.get(LEVEL):
        logging.getLogger("vllm").setLevel(logging.CRITICAL)


def process_environment(settings: Settings, device: str, *, sized: bool) -> dict[str, str | None]:
    """For vLLM's processes; None removes a variable. sized: whether the cache's size is an engine argument.

    vLLM's second model runner, its choice on GPUs, takes 1,024 allowed ids where speech needs 8,193, and no logits
    processors of the kind that the sampling rule is.
    """
    values: dict[str, str | None] = {
        LEVEL: os.environ.get(LEVEL, "ERROR"),
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        # This process has threads, with which a forked one may hang.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # Nothing of a worker's needs to be saved.
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": os.environ.get("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "2"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if device == "cpu":
        binds = settings.threads is None and os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
        values["OMP_NUM_THREADS"] = str(settings.threads or default_threads())
        values["VLLM_CPU_OMP_THREADS_BIND"] = binds or "nobind"
        if sized:
            values["VLLM_CPU_KVCACHE_SPACE"] = None
        if settings.eager(device):
            # Logits of a whole vocabulary would wait 40 s for a compiler first.
            values["TORCHDYNAMO_DISABLE"] = "1"
    return values


@contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Variables of this process, and so of those that it starts meanwhile; restored afterwards."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
