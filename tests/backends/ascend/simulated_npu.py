"""A simulated device `npu` in pure Python, whose tensors are the CPU's memory under another name.

It shows that a program puts every tensor where it should be: an operation on tensors of different devices raises, as on
a card. It computes with the CPU's kernels, so it shows nothing of an NPU's numbers or speed; it calls itself "simulated
device" wherever a name is asked for.

torch calls its spare device PrivateUse1. It is renamed here, gets one function for all its operators, and the modules
`torch.npu` and `torch_npu`. That cannot be undone: use a process of its own. The means are private parts of torch 2.13.
"""

from __future__ import annotations

import bisect
import collections
import ctypes
import importlib.machinery
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

NAME = "simulated device"
MEMORY = 64 << 30
"""Bytes that a card says it has."""

CPU, EXTENSION = 1, 12
"""DLPack's numbers for a CPU and for a device that it does not know."""


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _DLTensor(ctypes.Structure):
    """The head of DLPack's tensor: a pointer, then the device."""

    _fields_ = (("data", ctypes.c_void_p), ("device", _Device))


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class CardMemory:
    """What one card's tensors hold, by the host's allocations; views of one allocation count once."""

    def __init__(self) -> None:
        self.allocated = self.peak = self.reserved = self.peak_reserved = 0
        self._starts: list[int] = []
        self._blocks: dict[int, list[int]] = {}  # start -> [storages that are in it, bytes]
        self._ended: collections.deque[int] = collections.deque()
        self._lock = threading.Lock()

    def hold(self, host: torch.Tensor, npu: torch.Tensor) -> None:
        """Count the memory of `host` until the storage of `npu`, and all others that are in it, have ended."""
        storage = host.untyped_storage()
        with self._lock:
            self._settle()
            start, size = storage.data_ptr(), storage.nbytes()
            place = bisect.bisect_right(self._starts, start) - 1
            owner = self._starts[place] if place >= 0 else -1
            if owner < 0 or start >= owner + self._blocks[owner][1]:
                owner = start
                bisect.insort(self._starts, start)
                self._blocks[start] = [0, size]
                self.allocated += size
                self.peak = max(self.peak, self.allocated)
                self.reserved = max(self.reserved, self.allocated)
                self.peak_reserved = max(self.peak_reserved, self.reserved)
            self._blocks[owner][0] += 1
        # The collector may call this at any moment, also while the lock is held: it only takes a note.
        weakref.finalize(npu.untyped_storage(), self._ended.append, owner).atexit = False

    def settle(self) -> CardMemory:
        with self._lock:
            self._settle()
        return self

    def _settle(self) -> None:
        while self._ended:
            start = self._ended.popleft()
            block = self._blocks[start]
            block[0] -= 1
            if not block[0]:
                self.allocated -= block[1]
                self._starts.remove(start)
                del self._blocks[start]


class Cards:
    """The state of all simulated cards. calls: operators seen, by name. bfloat16: whether the chip has it."""

    def __init__(self, count: int) -> None:
        self.memory = [CardMemory() for _ in range(count)]
        self.calls: collections.Counter[str] = collections.Counter()
        self.bfloat16 = True
        self._current = threading.local()

    @property
    def current(self) -> int:
        """Of the calling thread, as on a card."""
        return getattr(self._current, "index", 0)

    @current.setter
    def current(self, index: int) -> None:
        self._current.index = index


cards = Cards(0)


def install(count: int = 2) -> None:
    """Register `count` cards for the rest of this process; a second call must ask for as many."""
    global cards
    if cards.memory:
        assert len(cards.memory) == count, "the simulated cards are registered already"
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    cards = Cards(count)
    module = NpuModule("torch.npu")
    module.__spec__ = importlib.machinery.ModuleSpec("torch.npu", None)
    _setup_privateuseone_for_python_backend("npu", backend_module=module)
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run_operator, "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    torch_npu: Any = types.ModuleType("torch_npu")
    torch_npu.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    torch_npu.__version__ = f"{torch.__version__.partition('+')[0]}+simulated"
    torch_npu.npu = module
    torch_npu.library = library  # registered for as long as it lives
    sys.modules["torch_npu"], sys.modules["torch.npu"] = torch_npu, module


class NpuModule(types.ModuleType):
    """What `torch.npu` offers of a card's state."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return len(cards.memory)

    def current_device(self) -> int:
        return cards.current

    def set_device(self, device: Any) -> None:
        cards.current = _index(device)

    def get_device_name(self, device: Any = None) -> str:
        return NAME

    def is_bf16_supported(self) -> bool:
        return cards.bfloat16

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def set_compile_mode(self, jit_compile: bool = True) -> None:
        self.jit_compile = jit_compile

    def manual_seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def synchronize(self, device: Any = None) -> None:
        pass

    def memory_allocated(self, device: Any = None) -> int:
        return _memory(device).allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return _memory(device).peak

    def memory_reserved(self, device: Any = None) -> int:
        return _memory(device).reserved

    def max_memory_reserved(self, device: Any = None) -> int:
        return _memory(device).peak_reserved

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory = _memory(device)
        memory.peak, memory.peak_reserved = memory.allocated, memory.reserved

    def empty_cache(self) -> None:
        for memory in cards.memory:
            memory.reserved = memory.settle().allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return MEMORY - _memory(device).reserved, MEMORY


def _index(device: Any) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return cards.current if index is None else index


def _memory(device: Any) -> CardMemory:
    return cards.memory[_index(device)].settle()


def _relabel(tensor: torch.Tensor, kind: int, index: int) -> torch.Tensor:
    """The same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor)  # pyright: ignore[reportAttributeAccessIssue]
    head = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    head.device.kind, head.device.index = kind, index
    return torch._C._from_dlpack(capsule)  # pyright: ignore[reportAttributeAccessIssue]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return _relabel(tensor.detach(), CPU, 0)


def _to_npu(tensor: torch.Tensor, index: int) -> torch.Tensor:
    if tensor.dtype == torch.bfloat16 and not cards.bfloat16:
        raise RuntimeError("this chip has no bfloat16")
    host = tensor.detach().resolve_conj().resolve_neg()
    npu = _relabel(host, EXTENSION, index)
    cards.memory[index].hold(host, npu)
    return npu


def _is_npu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


@torch.inference_mode(False)
@torch.no_grad()
def _run_operator(operator: Any, *arguments: Any, **options: Any) -> Any:
    """Any operator: the CPU's, on the same memory, once its tensors are seen to be on one card."""
    name = operator._schema.name
    cards.calls[name] += 1
    if name in _SPECIAL:
        return _SPECIAL[name](*arguments)
    found = _common_card(name, [each for each in tree_flatten((arguments, options))[0] if torch.is_tensor(each)])
    device = torch.device("npu", cards.current if found is None else found)
    if options.get("device") is not None:
        device = torch.device(options["device"])
    if "device" in options:
        options = {**options, "device": "cpu"} | ({"pin_memory": None} if "pin_memory" in options else {})
    index = cards.current if device.index is None else device.index
    taken: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(value: Any) -> Any:
        if not _is_npu(value):
            return value
        if id(value) not in taken:
            taken[id(value)] = (value, _to_host(value))
        return taken[id(value)][1]

    result = operator(*tree_map(take, arguments), **tree_map(take, options))
    # What an operator changes in place, it gives back as it came.
    originals = {id(host): npu for npu, host in taken.values()}

    def give(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in originals:
            return originals[id(value)]
        return _to_npu(value, index) if device.type == "npu" else value

    return tree_map(give, result)


def _common_card(name: str, tensors: list[torch.Tensor]) -> int | None:
    """The one card of all tensors, None for none; a number in a CPU's tensor of no dimension is legal on a card too."""
    places = {str(each.device) for each in tensors if _is_npu(each) or each.dim()}
    indices = {each.device.index for each in tensors if _is_npu(each)}
    if indices and len(places) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(places))}! ({name})"
        )
    return next(iter(indices), None)


def _copy(source: torch.Tensor, target: torch.Tensor, *_: Any) -> torch.Tensor:
    from_, to = (_to_host(each) if _is_npu(each) else each for each in (source, target))
    to.copy_(from_)
    return target


_SPECIAL: dict[str, Callable[..., Any]] = {
    "aten::_copy_from": _copy,
    "aten::_copy_from_and_resize": _copy,
    "aten::_local_scalar_dense": lambda tensor: _to_host(tensor).item(),
}
"""Operators that cross from one device to another."""
