"""Memory figures: which meter an engine has, and what torch's accelerators are asked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gpa_engines.backends.torch.memory import AcceleratorMemory, MetalMemory, device_memory
from gpa_engines.memory import MemoryReport, MemoryUse
from gpa_engines.registry import create_engine


class Accelerator(ModuleType):
    """Has the functions of torch.cuda and torch.npu that are used here, and remembers the calls."""

    def __init__(self) -> None:
        super().__init__("accelerator")
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        figures = {
            "memory_allocated": 1,
            "memory_reserved": 2,
            "max_memory_allocated": 3,
            "max_memory_reserved": 4,
            "synchronize": None,
            "reset_peak_memory_stats": None,
        }
        if name not in figures:
            raise AttributeError(name)

        def call(device: torch.device) -> int | None:
            self.calls.append((name, device))
            return figures[name]

        return call


def test_an_accelerator_is_read_after_it_has_done_its_work() -> None:
    module, device = Accelerator(), torch.device("cuda:1")
    meter = AcceleratorMemory(module, device)
    assert meter.read() == MemoryUse(allocated=1, reserved=2, peak_allocated=3, peak_reserved=4)
    assert module.calls[0] == ("synchronize", device)
    assert {each for _, each in module.calls} == {device}
    assert meter.reset_peak()
    assert module.calls[-1] == ("reset_peak_memory_stats", device)
    assert meter.source == "torch.cuda allocator"


def test_torch_cuda_has_what_is_called() -> None:
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        assert callable(getattr(torch.cuda, name))
    assert callable(torch.cuda.synchronize)
    assert callable(torch.cuda.reset_peak_memory_stats)


def test_each_device_has_its_meter() -> None:
    assert device_memory(torch.device("cpu")) is None
    cuda = device_memory(torch.device("cuda:0"))
    assert isinstance(cuda, AcceleratorMemory)
    assert cuda.source == "torch.cuda allocator"
    metal = device_memory(torch.device("mps"))
    assert isinstance(metal, MetalMemory)
    assert metal.reset_peak() is False


def test_an_engine_on_a_cpu_has_no_meter_of_its_own(tiny_checkpoint: Path) -> None:
    engine = create_engine("torch", tiny_checkpoint, device="cpu", threads=1)
    try:
        assert isinstance(engine, MemoryReport)
        assert engine.memory_meter is None
    finally:
        asyncio.run(engine.close())
