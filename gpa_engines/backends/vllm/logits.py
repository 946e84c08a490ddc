"""Raw logits out of vLLM, which gives them as log-probabilities "of all ids" in the mode `raw_logits`.

What comes from vLLM's engine process are arrays, sorted by value, that its client would turn into some 24 MiB of Python
objects for one position of the released vocabulary. So they are taken out before it sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from gpa_codecs.errors import CapacityError, RequestError

ROW_COST = 8
"""What one position's logits of the released vocabulary cost on a CPU, in tokens of a prefill: the head, a sort of the
row, and its way here. On a GPU it is more."""

COPIES = 3
"""Of ids and values of one request, 4 bytes each: the worker's, the message's, and what becomes of them here."""


def reads_whole(positions: Sequence[int]) -> bool:
    """Whether one prefill with the logits of every position costs less than one prefill for each that is wanted."""
    last = positions[-1] + 1
    alone = sum(position + 1 for position in positions) + ROW_COST * len(positions)
    return last + ROW_COST * last < alone


def check_memory(positions: Sequence[int], vocab_size: int) -> None:
    """Raise CapacityError where one prefill with the logits of every position would not fit into memory.

    vLLM's processes would be killed for it, and with them every other request.
    """
    needed = COPIES * 8 * (positions[-1] + 1) * (vocab_size + 1)
    free = psutil.virtual_memory().available
    if needed > free:
        raise CapacityError(
            f"logits of {positions[-1] + 1} positions take {needed / 2**30:.1f} GiB on their way from vLLM, and "
            f"{free / 2**30:.1f} GiB are free: ask for a shorter prompt's, or for few positions"
        )


@dataclass(slots=True)
class Taken:
    """Arrays of one request: of the positions before the last, and of the last. ids, values: [N, 1 + V], sorted; the
    first column is that of the token that followed."""

    before: list[tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=list)
    last: list[tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=list)

    def rows(self, count: int, vocab_size: int) -> NDArray[np.float32]:
        """float32[count, V] of positions 0 to count - 1, or with a count of 1 of the last position alone."""
        parts = [*self.before, *self.last] if count > 1 else self.last
        rows = np.full((count, vocab_size), np.nan, np.float32)
        done = 0
        for ids, values in parts:
            end = done + len(ids)
            if end > count:
                break
            np.put_along_axis(rows[done:end], ids[:, 1:].astype(np.int64), values[:, 1:], axis=1)
            done = end
        if done != count or any(ids.shape[1] != vocab_size + 1 for ids, _ in parts):
            shapes = [list(ids.shape) for ids, _ in parts]
            raise RequestError(f"vLLM gave logits of shapes {shapes}; expected {count} rows of {vocab_size} + 1")
        return rows


class LogitsTap:
    """Takes the logits of chosen requests out of what an AsyncLLM receives. Lives on the AsyncLLM's loop."""

    def __init__(self, core_client: Any) -> None:
        """core_client: AsyncLLM.engine_core."""
        self._receive = core_client.get_output_async
        self._taken: dict[str, Taken] = {}
        core_client.get_output_async = self._tapped

    def open(self, request_id: str) -> Taken:
        """Where the arrays of this request will be."""
        return self._taken.setdefault(request_id, Taken())

    def close(self, request_id: str) -> None:
        """Take no more of it."""
        self._taken.pop(request_id, None)

    async def _tapped(self) -> Any:
        outputs = await self._receive()
        if self._taken:
            for output in outputs.outputs:
                # vLLM appends characters of its own to the name that a request was given.
                taken = self._taken.get(output.request_id) or self._taken.get(output.request_id.rpartition("-")[0])
                if taken is not None:
                    _take(output, taken)
        return outputs


def _take(output: Any, taken: Taken) -> None:
    if (prompt := output.new_prompt_logprobs_tensors) is not None:
        taken.before.append((np.asarray(prompt.logprob_token_ids), np.asarray(prompt.logprobs)))
        output.new_prompt_logprobs_tensors = None
    if (last := output.new_logprobs) is not None:
        taken.last.append((np.asarray(last.logprob_token_ids), np.asarray(last.logprobs)))
        output.new_logprobs = None
