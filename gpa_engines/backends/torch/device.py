"""Which device, which dtype on it, and what else is particular to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpa_codecs.errors import BackendError
from gpa_engines.backends.torch.attention import PlanFactory

DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an engine's model is and how it computes there; made by the backend that serves the kind of device.

    backend: its name. dtype: one of `DTYPES`. plans: of attention; None takes the usual ones of the device. enter:
    called first on every thread that works for the engine, for settings that belong to a thread. note: about the
    device, for `EngineInfo.note`.
    """

    backend: str
    device: torch.device
    dtype: str
    plans: PlanFactory | None = None
    enter: Callable[[], object] | None = None
    note: str = ""


def move(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor on the device; converted first, because a device may lack the dtype that it is stored in."""
    return tensor.to(dtype).to(device)


def choose_device(name: str) -> torch.device:
    """ "auto" (cuda, then mps, then cpu), "cpu", "cuda", "cuda:N" or "mps"; BackendError for one that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise BackendError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise BackendError("device 'mps' is not available: it needs a Mac with Apple silicon and a torch built for it")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise BackendError(f"device {name!r} is not available: torch {torch.__version__} sees {count} CUDA devices")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> str:
    """One of `DTYPES`. "auto" is float32 on a CPU and bfloat16 on an accelerator.

    On a CPU float32 gives the reference's own tokens; the released bfloat16 weights lose nothing in it, and the faster
    bfloat16 and int8 change logits by about 1% and 3%. On accelerators bfloat16 is what the model was released in.
    """
    if name == "auto":
        return "float32" if device.type == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise BackendError(f"dtype {name!r} is unknown; expected auto, {', '.join(DTYPES)}")
    return name
