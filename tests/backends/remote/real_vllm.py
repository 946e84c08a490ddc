"""A real vLLM server on loopback, as a process group that can be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

STARTED = 240.0
"""Seconds that a server gets to start, on a machine with one free core."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


def vllm_python() -> str | None:
    """The Python that has vLLM: GPA_VLLM_PYTHON, or this one; None where there is none."""
    named = os.environ.get("GPA_VLLM_PYTHON")
    if named:
        return named
    return sys.executable if find_spec("vllm") is not None else None


class RealVllm:
    """`python -m vllm.entrypoints.openai.api_server` in float32, that gives whole rows of logits."""

    def __init__(self, model: Path, log: Path, key: str) -> None:
        self._model, self._log, self._key = model, log, key
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        python = vllm_python()
        assert python is not None
        command = [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self._model)),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--generation-config", "vllm", "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "32"),
            *("--max-logprobs", "-1", "--logprobs-mode", "raw_logits", "--enforce-eager", "--seed", "0"),
        ]
        environment = {**_environment(), **ENVIRONMENT, "VLLM_API_KEY": self._key}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        begun = time.monotonic()
        while not self._answers():
            late = time.monotonic() - begun > STARTED
            if self._process.poll() is not None or late:
                tail = self._log.read_text(errors="replace")[-3000:]
                self.kill()
                raise AssertionError(f"vLLM {'took too long to start' if late else 'ended'}:\n{tail}")
            time.sleep(0.5)

    def kill(self) -> None:
        """SIGKILL to the whole process group, as the machine's end would be."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


def _environment() -> Mapping[str, str]:
    """Without what points this Python to its own packages, which are not those of vLLM's."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
