"""What decides how llama.cpp is used on this CPU: its cores and its kind."""

from __future__ import annotations

import os
import platform
from pathlib import Path

ROOT = Path("/")


def default_threads(root: Path = ROOT) -> int:
    """Physical cores that this process may use, by its affinity and its control group's quota.

    ggml's threads wait by spinning: one more than there are cores makes every operation wait for a time slice.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = {_core(root, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota(root)))


def is_x86() -> bool:
    """Whether the CPU is an Intel or AMD one."""
    return platform.machine().lower() in ("x86_64", "amd64", "x86", "i386", "i686")


def _core(root: Path, cpu: int) -> str:
    """The hardware threads of a CPU's core, the same text for each of them."""
    try:
        return (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _quota(root: Path) -> int:
    """Whole CPUs that the control group grants (cgroup v2, which a container sees as its root)."""
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return int(quota) // int(period)
    except (OSError, ValueError):
        return 2**31
