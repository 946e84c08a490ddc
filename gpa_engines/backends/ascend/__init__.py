"""The Ascend backend: the torch engine on Huawei's NPUs, one engine per card.

What was run: everything on a simulated device (see docs/ascend.md), which proves where tensors are and says nothing of
a chip's numbers or speed. Nothing was run on an NPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpa_engines.engine import Engine


def create_engine(
    model_dir: str | Path,
    *,
    device: str = "auto",
    devices: str | Sequence[str] | None = None,
    dtype: str = "auto",
    attention: str = "sdpa",
    threads: int | None = None,
    max_tokens_in_flight: int = 8192,
    max_batch: int = 16,
    prefill_chunk: int = 256,
) -> Engine:
    """Load the language model of a checkpoint folder onto one NPU, or onto several.

    device: "auto" and "npu" are the first NPU, "npu:N" is the one of that number.
    devices: several of them, "npu:0,npu:1" or a list, each with the whole model; a request runs on the one that is
        least busy. In place of `device`.
    dtype: "auto" (bfloat16 where the chip has it, else float16), "bfloat16", "float16" or "float32".
    attention: "sdpa" (torch's own call, for which torch_npu may have a fused kernel) or "eager" (two products and a
        softmax).
    threads: torch's on the host; this setting is the whole process's. None leaves it alone.
    max_tokens_in_flight: positions of prompt and answer that all running requests of one card together may hold; one
        costs 112 KiB at the released size, in float32 twice that, taken at the start.
    max_batch: requests that run on one card at a time; more wait in order.
    prefill_chunk: prompt tokens read per step, while running requests go on.
    Raises BackendError for a value or device that cannot be had, and where torch_npu or CANN is missing;
    CheckpointError for a damaged checkpoint.
    """
    from gpa_engines.backends.ascend.cards import check_cards, parse_cards
    from gpa_engines.backends.ascend.runtime import load_torch_npu

    cards = parse_cards(device, devices)
    # Before anything imports torch: see there.
    torch_npu = load_torch_npu()
    check_cards(torch_npu, cards)
    from gpa_engines.backends.ascend.engine import build_engine

    return build_engine(
        Path(model_dir),
        torch_npu,
        cards,
        dtype,
        attention,
        threads,
        max_tokens_in_flight,
        max_batch,
        prefill_chunk,
    )
