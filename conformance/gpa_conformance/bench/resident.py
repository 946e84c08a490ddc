"""The memory of a process, for engines whose device has no allocator that counts: the resident set (Linux, proc(5))."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpa_conformance.bench.timing import peak_rss
from gpa_engines.memory import MemoryMeter, MemoryUse


class ResidentMemory:
    """This process as a MemoryMeter. allocated: its private memory. reserved: all of its resident set, so with mapped
    files such as weights and libraries. Off Linux only the peak of the resident set is known."""

    source = "resident set of the process: allocated is its private part, reserved is all of it"

    def __init__(self, folder: Path = Path("/proc/self")) -> None:
        self._folder = folder

    def read(self) -> MemoryUse:
        return MemoryUse(self._field("RssAnon"), self._field("VmRSS"), None, peak_rss())

    def reset_peak(self) -> bool:
        """Linux lets a process set its own peak back to what it holds now."""
        try:
            (self._folder / "clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def _field(self, name: str) -> int | None:
        try:
            lines = (self._folder / "status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def memory_facts(meter: MemoryMeter) -> dict[str, Any]:
    """The meter's figures and this process's, as JSON values in bytes."""
    use, host = meter.read(), ResidentMemory().read()
    return {
        "source": meter.source,
        "allocated": use.allocated,
        "reserved": use.reserved,
        "peak_allocated": use.peak_allocated,
        "peak_reserved": use.peak_reserved,
        "host_resident": host.reserved,
        "host_peak_resident": host.peak_reserved,
    }
