"""MLX's memory settings, and its figures under the protocol of `gpa_engines.memory`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import mlx.core as mx

from gpa_codecs.errors import BackendError
from gpa_engines.memory import MemoryMeter, MemoryUse


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """Bytes, as `create_engine` explains them; None leaves MLX's own setting."""

    memory_limit: int | None = None
    cache_limit: int | None = None
    wired_limit: int | None = None

    def check(self, device: str) -> None:
        """Raise BackendError for a value that cannot be set on this device."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (type(value) is not int or value < 0):
                raise BackendError(f"{field.name} is {value!r}; expected a number of bytes, or None")
        if self.wired_limit is None:
            return
        if device != "gpu" or not mx.metal.is_available():
            raise BackendError(f"wired_limit needs Apple's GPU; the device is {device!r}")
        largest = int(mx.device_info()["max_recommended_working_set_size"])
        if self.wired_limit > largest:
            raise BackendError(f"wired_limit is {self.wired_limit}; this machine allows at most {largest} bytes")

    def apply(self) -> None:
        """Make them the process's settings."""
        if self.memory_limit is not None:
            mx.set_memory_limit(self.memory_limit)
        if self.cache_limit is not None:
            mx.set_cache_limit(self.cache_limit)
        if self.wired_limit is not None:
            mx.set_wired_limit(self.wired_limit)


def device_memory(device: str) -> MemoryMeter | None:
    """The meter of a device; None for the CPU, whose memory is the process's."""
    return None if device == "cpu" else MlxMemory()


class MlxMemory:
    """MLX's own allocator, which counts all arrays of the process."""

    source = "mlx allocator"

    def read(self) -> MemoryUse:
        active = mx.get_active_memory()
        return MemoryUse(active, active + mx.get_cache_memory(), mx.get_peak_memory(), None)

    def reset_peak(self) -> bool:
        mx.reset_peak_memory()
        return True
