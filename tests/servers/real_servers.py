"""Real vLLM and SGLang servers on loopback, as process groups that can be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

STARTED = 300.0
"""Seconds that a server gets to start, on a machine with one free core."""

VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


def vllm_python() -> str | None:
    """The Python that has vLLM: GPA_VLLM_PYTHON, or this one; None where there is none."""
    return _python("GPA_VLLM_PYTHON", "vllm")


def sglang_python() -> str | None:
    """The Python that has SGLang: GPA_SGLANG_PYTHON, or this one; None where there is none."""
    return _python("GPA_SGLANG_PYTHON", "sglang")


def _python(variable: str, package: str) -> str | None:
    if named := os.environ.get(variable):
        return named
    return sys.executable if find_spec(package) is not None else None


class RealServer(ABC):
    """A server of one model. log: where it prints. key: what clients must know, if anything."""

    health: str
    """Path that answers 200 once requests are served."""

    def __init__(self, model: Path, log: Path, key: str | None) -> None:
        self._model, self._log, self._key = model, log, key
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _environment(self) -> Mapping[str, str]: ...

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers; one that runs is ended first."""
        self.kill()
        environment = {**self._environment(), "HF_HUB_OFFLINE": "1"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdout=log, stderr=log, env=environment, start_new_session=True
            )
        begun = time.monotonic()
        while not self._answers():
            late = time.monotonic() - begun > STARTED
            if self._process.poll() is not None or late:
                tail = self._log.read_text(errors="replace")[-3000:]
                self.kill()
                raise AssertionError(f"the server {'took too long to start' if late else 'ended'}:\n{tail}")
            time.sleep(0.5)

    def kill(self) -> None:
        """SIGKILL to the whole process group, as the machine's end would be."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def _answers(self) -> bool:
        wanted = urllib.request.Request(f"{self.url}{self.health}")
        if self._key is not None:
            wanted.add_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(wanted, timeout=20) as answer:
                return answer.status == 200
        except OSError:
            return False


class RealVllm(RealServer):
    """`python -m vllm.entrypoints.openai.api_server` in float32, that gives whole rows of logits."""

    health = "/health"

    def _command(self) -> list[str]:
        python = vllm_python()
        assert python is not None
        return [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self._model)),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--generation-config", "vllm", "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "32"),
            *("--max-logprobs", "-1", "--logprobs-mode", "raw_logits", "--enforce-eager", "--seed", "0"),
        ]

    def _environment(self) -> Mapping[str, str]:
        key = {} if self._key is None else {"VLLM_API_KEY": self._key}
        return {**_without_paths(), **VLLM_ENVIRONMENT, **key}


class RealSglang(RealServer):
    """`python -m sglang.launch_server` on the CPU in float32, that gives hidden states, with a tokenizer as servers
    usually have one. context: positions of a request.
    """

    health = "/health_generate"

    def __init__(self, model: Path, log: Path, key: str | None = None, context: int = 2048) -> None:
        super().__init__(model, log, key)
        self._context = context

    def _command(self) -> list[str]:
        python = sglang_python()
        assert python is not None
        arguments = {
            "--model-path": str(self._model),
            "--port": str(self.port),
            "--device": "cpu",
            "--dtype": "float32",
            "--attention-backend": "torch_native",
            "--grammar-backend": "none",
            "--max-total-tokens": "8192",
            "--context-length": str(self._context),
            "--log-level": "error",
        }
        if self._key is not None:
            arguments["--api-key"] = self._key
        flags = ("--disable-overlap-schedule", "--enable-return-hidden-states", "--enable-custom-logit-processor")
        return [python, "-m", "sglang.launch_server", *(word for pair in arguments.items() for word in pair), *flags]

    def _environment(self) -> Mapping[str, str]:
        # The rule of sampling is imported by the server, from here.
        roots = [str(Path.cwd()), str(Path.cwd() / "codecs")]
        if sglang_python() == sys.executable:
            roots += filter(None, [os.environ.get("PYTHONPATH")])
        return {**_without_paths(), "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": os.pathsep.join(roots)}


def _without_paths() -> Mapping[str, str]:
    """Without what points this Python to its own packages, which are not those of the server's."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
