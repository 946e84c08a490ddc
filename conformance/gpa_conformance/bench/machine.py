"""What a figure depends on besides the program: the machine, its load, the versions, the checkpoint."""

from __future__ import annotations

import os
import platform
import resource
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpa_engines.checkpoint import Checkpoint

PACKAGES = ("gpa-engines", "numpy", "torch", "transformers", "safetensors", "tokenizers")


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory in bytes, system and package versions (None: not installed)."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory": memory("MemTotal"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(field: str) -> int | None:
    """A field of /proc/meminfo in bytes, where there is such a file."""
    for line in _lines(Path("/proc/meminfo")):
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Path, size of the language model's weights, and SHA-256 of every file; reading them also warms the page cache."""
    return {
        "path": str(checkpoint.root),
        "lm_bytes": sum(file.stat().st_size for file in checkpoint.root.glob("*.safetensors")),
        "sha256": checkpoint.fingerprint(),
    }


@dataclass(frozen=True, slots=True)
class LoadMeter:
    """Measures how many cores others kept busy between its start and `foreign_cores`."""

    moment: float
    busy: float | None
    own: float

    @classmethod
    def start(cls) -> LoadMeter:
        return cls(time.monotonic(), _busy_seconds(), _own_seconds())

    def foreign_cores(self) -> float | None:
        """Cores used by anything but this process and its ended children, on average; None where unknown."""
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        foreign = (busy - self.busy) - (_own_seconds() - self.own)
        return max(0.0, foreign / (time.monotonic() - self.moment))


def _busy_seconds() -> float | None:
    """CPU seconds of all cores since boot that were neither idle nor waiting for a disk (Linux, proc(5))."""
    for line in _lines(Path("/proc/stat")):
        if line.startswith("cpu "):
            user, nice, system, _idle, _iowait, irq, softirq, *_ = (int(field) for field in line.split()[1:])
            return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return None


def _own_seconds() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _cpu_model() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
