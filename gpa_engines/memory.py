"""Memory figures that an engine may offer beyond the Engine protocol: what its device's allocator holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes; None where nobody counts them.

    allocated: held by tensors. reserved: taken from the device, the allocator's cache included. peak_*: the largest
    since the meter's peaks were last reset.
    """

    allocated: int | None
    reserved: int | None
    peak_allocated: int | None
    peak_reserved: int | None


class MemoryMeter(Protocol):
    """Reads the memory of one device. Methods may be called from any thread."""

    @property
    def source(self) -> str:
        """What counts, in words: "torch.cuda allocator"."""
        ...

    def read(self) -> MemoryUse:
        """The figures once all work that was given to the device is done."""
        ...

    def reset_peak(self) -> bool:
        """Let the peaks start anew; False where the device cannot, so that peaks are since its start."""
        ...


@runtime_checkable
class MemoryReport(Protocol):
    """An engine that may have a meter of its own."""

    @property
    def memory_meter(self) -> MemoryMeter | None:
        """None where the engine's memory is the process's, as on a CPU."""
        ...


class SummedMemory:
    """The meters of several devices as one; the sum of their peaks may be more than was ever held at one time."""

    def __init__(self, meters: Sequence[MemoryMeter]) -> None:
        self._meters = meters

    @property
    def source(self) -> str:
        return f"{', '.join(dict.fromkeys(meter.source for meter in self._meters))}; sum of {len(self._meters)} devices"

    def read(self) -> MemoryUse:
        uses = [meter.read() for meter in self._meters]
        columns = ([getattr(use, field.name) for use in uses] for field in fields(MemoryUse))
        return MemoryUse(*(None if None in column else sum(column) for column in columns))

    def reset_peak(self) -> bool:
        done = [meter.reset_peak() for meter in self._meters]
        return all(done)
