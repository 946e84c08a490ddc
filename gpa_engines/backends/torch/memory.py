"""Memory figures of torch's devices, under the protocol of `gpa_engines.memory`."""

from __future__ import annotations

from types import ModuleType

import torch

from gpa_engines.memory import MemoryMeter, MemoryUse


def device_memory(device: torch.device) -> MemoryMeter | None:
    """The meter of a device; None for the CPU, for which torch counts nothing."""
    if device.type == "cpu":
        return None
    if device.type == "mps":
        return MetalMemory()
    return AcceleratorMemory(getattr(torch, device.type), device)


class AcceleratorMemory:
    """The caching allocator of `torch.cuda`, and of modules with the same functions such as `torch.npu`."""

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        self._module = module
        self._device = device

    @property
    def source(self) -> str:
        return f"torch.{self._device.type} allocator"

    def read(self) -> MemoryUse:
        self._module.synchronize(self._device)
        return MemoryUse(
            self._module.memory_allocated(self._device),
            self._module.memory_reserved(self._device),
            self._module.max_memory_allocated(self._device),
            self._module.max_memory_reserved(self._device),
        )

    def reset_peak(self) -> bool:
        self._module.reset_peak_memory_stats(self._device)
        return True


class MetalMemory:
    """Apple's Metal: what tensors hold, and what the driver has given; it keeps no peaks."""

    source = "torch.mps driver"

    def read(self) -> MemoryUse:
        torch.mps.synchronize()
        return MemoryUse(torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory(), None, None)

    def reset_peak(self) -> bool:
        return False
