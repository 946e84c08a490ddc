"""What llama.cpp should know about the CPU: its cores, and whether it has AMX."""

from __future__ import annotations

import os
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


def has_amx(root: Path = ROOT) -> bool:
    """Whether ggml might use AMX tiles: true only on Linux with such a CPU."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return any(flag.startswith("amx") for flag in flags.split())


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
