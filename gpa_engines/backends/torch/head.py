"""The LM head, over the whole vocabulary or only the rows that a request may emit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpa_codecs.errors import BackendError
from gpa_engines.backends.torch.linear import Linear, PlainLinear, WeightFormat
from gpa_engines.step_model import CandidateSet


class Head:
    """Logits from normalised hidden rows.

    weight: [V, hidden], tied to the embedding or not; on a CPU a mapped file, from which rows are packed when they are
    first wanted. A small candidate set gets a layer of its own (kept while it is among the last used ones); one that
    covers much of the vocabulary is cut out of the full result instead, so that memory holds the matrix once.
    """

    MAX_SHARE = 4
    MAX_KEPT = 4

    def __init__(self, weight: Tensor, weights: WeightFormat) -> None:
        self.weight = weight
        self.format = weights
        self.full: Linear | None = None
        self.restricted: OrderedDict[CandidateSet, Linear] = OrderedDict()

    def last_logits(self, rows: Tensor, candidates: Sequence[CandidateSet | None]) -> list[NDArray[np.float32]]:
        """rows: [n, hidden] in the compute dtype; candidates: one per row -> n times float32[R]."""
        groups: dict[CandidateSet | None, list[int]] = {}
        for row, wanted in enumerate(candidates):
            groups.setdefault(wanted, []).append(row)
        results = dict[int, NDArray[np.float32]]()
        for wanted, members in groups.items():
            part = rows if len(members) == len(rows) else rows[members]
            results.update(zip(members, self.all_logits(part, wanted), strict=True))
        return [results[row] for row in range(len(rows))]

    def all_logits(self, rows: Tensor, wanted: CandidateSet | None, *, wide: bool = False) -> NDArray[np.float32]:
        """rows: [n, hidden] in the compute dtype -> float32[n, R]; wide: by `Linear.wide`."""
        restricted = wanted is not None and len(wanted.ids) * self.MAX_SHARE <= len(self.weight)
        linear = self._restrict(wanted) if wanted is not None and restricted else self._whole()
        count = len(rows)
        if count < self.format.min_rows:
            rows = rows.expand(self.format.min_rows, -1).contiguous()
        logits = (linear.wide(rows) if wide else linear(rows))[:count].float().cpu().numpy()
        return logits if wanted is None or restricted else logits[:, wanted.ids]

    def check_tied(self) -> None:
        """Raise BackendError where the layer of a tied, unchanged weight would take the table's memory once more."""
        linear = self._whole()
        if isinstance(linear, PlainLinear) and _address(linear.weight) != _address(self.weight):
            mebibytes = self.weight.nbytes / 2**20
            raise BackendError(
                f"on {self.weight.device} the head is a second copy of the embedding table ({mebibytes:.0f} MiB), "
                "which config.json ties: torch copied a tensor that was in its place already; use versions of "
                "torch and of the device's package that pair"
            )

    def _whole(self) -> Linear:
        if self.full is None:
            self.full = self.format.build(self.weight)
        return self.full

    def _restrict(self, wanted: CandidateSet) -> Linear:
        if wanted not in self.restricted:
            self.restricted[wanted] = self.format.build(_select(self.weight, wanted.ids))
            if len(self.restricted) > self.MAX_KEPT:
                self.restricted.popitem(last=False)
        self.restricted.move_to_end(wanted)
        return self.restricted[wanted]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _select(weight: Tensor, ids: NDArray[np.int64]) -> Tensor:
    """Rows of `weight`; a view when they are contiguous."""
    first, last = int(ids[0]), int(ids[-1])
    if last - first + 1 == len(ids):
        return weight[first : last + 1]
    return weight[torch.tensor(ids, device=weight.device)]
