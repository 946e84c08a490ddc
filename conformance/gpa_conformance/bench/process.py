"""The parent's side of a child process that measures: start it, ask it one thing at a time, end it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from types import TracebackType
from typing import IO, Any

PATIENCE_AT_THE_END = 10.0
"""Seconds that a child gets to free its model before it is killed."""

LAST_WORDS = 300
"""Characters of standard error that go into the reason when a child dies without an answer."""


class ChildFailed(Exception):
    """A child answered with an error, died or took too long. traceback: the child's, or what it printed last."""

    def __init__(self, reason: str, traceback: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.traceback = traceback


class Child:
    """One `gpa_conformance.bench.child`; leaving the `with` block ends it whatever state it is in.

    threads: goes into OMP_NUM_THREADS and its like. timeout: seconds for one answer; a child that takes longer is
    killed. The child has a session of its own, so Ctrl-C reaches the parent alone, which then ends it.
    """

    def __init__(self, role: str, settings: dict[str, Any], *, threads: int, timeout: float) -> None:
        self._timeout = timeout
        self.idle_cpu_s = 0.0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpa_conformance.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {name: str(threads) for name in THREAD_VARIABLES},
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        try:
            self._exchange({"role": role, "settings": settings})
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """Let the child do one thing and wait for its answer; raises ChildFailed, after which it may still live."""
        return self._exchange({"call": call, "arguments": arguments})

    def close(self) -> None:
        """Let the child end by itself, and kill it if it does not."""
        try:
            self._requests.close()
            self._process.wait(PATIENCE_AT_THE_END)
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            self.kill()

    def kill(self) -> None:
        """End the child and what it started, at once; harmless when it has ended."""
        if self._process.returncode is None:
            _kill_group(self._process)
        self._process.wait()
        self._reader.join()
        for file in (self._requests, self._process.stdout, self._errors):
            try:
                if file is not None:
                    file.close()
            except BrokenPipeError:
                pass

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        except OSError:
            raise self._death() from None
        try:
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            _kill_group(self._process)
            raise ChildFailed(f"no answer within {self._timeout:g} s") from None
        if not line:
            raise self._death()
        answer = json.loads(line)
        self.idle_cpu_s += answer["idle_cpu_s"]
        if "error" in answer:
            raise ChildFailed(answer["error"], answer["traceback"])
        return answer["result"]

    def _death(self) -> ChildFailed:
        status = self._process.wait()
        self._errors.seek(0)
        printed = self._errors.read().decode("utf-8", "replace").strip()
        how = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        last = printed.splitlines()[-1][-LAST_WORDS:] if printed else ""
        return ChildFailed(f"the process was {how}" if status < 0 else f"the process {how}: {last}", printed)

    def _read(self, answers: IO[str]) -> None:
        for line in answers:
            self._answers.put(line)
        self._answers.put("")


def _kill_group(process: subprocess.Popen[str]) -> None:
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What the numeric libraries read at their start."""
