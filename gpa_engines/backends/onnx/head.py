"""The LM head, over the whole vocabulary or only the rows that a request may emit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_engines.backends.onnx.exported import ExportedLM
from gpa_engines.backends.onnx.runtime import Session, wrap
from gpa_engines.backends.onnx.tables import Table
from gpa_engines.step_model import CandidateSet


class Head:
    """Logits from normalised hidden rows.

    A small candidate set is multiplied in float32, with its rows of the table copied out (and kept while it is among
    the last used ones). One that covers much of the vocabulary is cut out of the full result. For that the float32
    table is used where it lies; a float16 one is expanded, and an 8-bit one loaded as a graph, when first wanted.
    """

    MAX_SHARE = 4
    MAX_KEPT = 4

    # A single row is multiplied by another kernel than several, which differs in the last bits.
    MIN_ROWS = 2

    def __init__(self, exported: ExportedLM, table: Table, provider: str, threads: int | None) -> None:
        self._exported, self._table = exported, table
        self._provider, self._threads = provider, threads
        self._float = Session(exported.float_head, provider, threads)
        self._int8: Session | None = None
        self._whole: Any = None
        self._restricted: OrderedDict[CandidateSet, Any] = OrderedDict()

    def last_logits(
        self, rows: NDArray[np.float32], candidates: Sequence[CandidateSet | None]
    ) -> list[NDArray[np.float32]]:
        """rows: float32[n, hidden]; candidates: one per row -> n times float32[R]."""
        groups: dict[CandidateSet | None, list[int]] = {}
        for row, wanted in enumerate(candidates):
            groups.setdefault(wanted, []).append(row)
        results = dict[int, NDArray[np.float32]]()
        for wanted, members in groups.items():
            results.update(zip(members, self.all_logits(rows[members], wanted), strict=True))
        return [results[row] for row in range(len(rows))]

    def all_logits(self, rows: NDArray[np.float32], wanted: CandidateSet | None) -> NDArray[np.float32]:
        """rows: float32[n, hidden] -> float32[n, R]."""
        count = len(rows)
        if count < self.MIN_ROWS:
            rows = np.repeat(rows, self.MIN_ROWS, axis=0)
        if wanted is not None and len(wanted.ids) * self.MAX_SHARE <= self._exported.config.vocab_size:
            return self._multiply(rows, self._restrict(wanted))[:count]
        logits = self._multiply_whole(rows)[:count]
        return logits if wanted is None else logits[:, wanted.ids]

    def _multiply(self, rows: NDArray[np.float32], weight: Any) -> NDArray[np.float32]:
        return self._float.run({"hidden": rows, "weight": weight})[0]

    def _multiply_whole(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if (path := self._exported.int8_head) is not None:
            if self._int8 is None:
                self._int8 = Session(path, self._provider, self._threads)
            return self._int8.run({"hidden": rows})[0]
        if self._whole is None:
            self._whole = wrap(self._table.whole())
        return self._multiply(rows, self._whole)

    def _restrict(self, wanted: CandidateSet) -> Any:
        if wanted not in self._restricted:
            self._restricted[wanted] = wrap(self._table.rows(wanted.ids))
            if len(self._restricted) > self.MAX_KEPT:
                self._restricted.popitem(last=False)
        self._restricted.move_to_end(wanted)
        return self._restricted[wanted]
