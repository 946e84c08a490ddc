"""The torch engine on NPUs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from gpa_codecs.errors import BackendError
from gpa_engines.backends.torch.attention import AttentionKernel, eager_attention, padded_plans
from gpa_engines.backends.torch.device import Placement
from gpa_engines.backends.torch.engine import EngineSizes, load_engine
from gpa_engines.engine import Engine
from gpa_engines.spread_engine import SpreadEngine

DTYPES = ("bfloat16", "float16", "float32")

ATTENTION: dict[str, AttentionKernel] = {"sdpa": F.scaled_dot_product_attention, "eager": eager_attention}


def build_engine(
    folder: Path,
    torch_npu: ModuleType,
    cards: Sequence[int],
    dtype: str,
    attention: str,
    threads: int | None,
    max_tokens_in_flight: int,
    max_batch: int,
    prefill_chunk: int,
) -> Engine:
    """What :func:`gpa_engines.backends.ascend.create_engine` does, once torch_npu is imported and the cards are there.

    The engine's note is the chip by the name that it gives itself, which for a simulated device says just that.
    """
    sizes = EngineSizes(max_tokens_in_flight, max_batch, prefill_chunk, threads)
    if attention not in ATTENTION:
        raise BackendError(f"attention {attention!r} is unknown; expected {' or '.join(ATTENTION)}")
    engines = []
    try:
        for card in cards:
            placement = Placement(
                "ascend",
                torch.device("npu", card),
                choose_dtype(dtype, torch_npu, card),
                padded_plans(ATTENTION[attention]),
                functools.partial(torch_npu.npu.set_device, card),
                f"{torch_npu.npu.get_device_name(card)}, torch_npu {torch_npu.__version__}",
            )
            engines.append(load_engine(folder, placement, sizes))
    except BaseException:
        # An engine that nobody holds ends; the traceback would go on holding those that were loaded before.
        engines.clear()
        raise
    return engines[0] if len(engines) == 1 else SpreadEngine(engines)


def choose_dtype(name: str, torch_npu: ModuleType, card: int) -> str:
    """One of `DTYPES`. "auto" is bfloat16, as released, and float16 on a chip without it, such as the Ascend 910A."""
    supported = torch_npu.npu.is_bf16_supported()
    if name == "auto":
        return "bfloat16" if supported else "float16"
    if name == "int8":
        raise BackendError(
            "dtype 'int8' is not offered on an NPU: there is no product with int8 weights here, they would be expanded "
            "for every token; expected auto, bfloat16, float16 or float32"
        )
    if name not in DTYPES:
        raise BackendError(f"dtype {name!r} is unknown; expected auto, {', '.join(DTYPES)}")
    if name == "bfloat16" and not supported:
        raise BackendError(
            f"dtype 'bfloat16' is not available: npu:{card} ({torch_npu.npu.get_device_name(card)}) has no bfloat16; "
            "use float16, or auto"
        )
    return name
