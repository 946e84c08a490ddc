"""The LM head, over the whole vocabulary or only the rows that a request may emit."""

from __future__ import annotations

from collections import OrderedDict

import mlx.core as mx
import numpy as np

from gpa_engines.backends.mlx.linear import Linear, StoredWeight, WeightFormat
from gpa_engines.step_model import CandidateSet


class Head:
    """Logits from normalised hidden rows.

    weight: V rows, tied to the embedding or not, as stored; layers are built of it when they are first wanted. A small
    candidate set gets one of its own (kept while it is among the last used ones), quantised rows with their own scales
    and biases; one that covers much of the vocabulary is cut out of the full result instead, so that memory holds the
    matrix once.
    """

    MAX_SHARE = 4
    MAX_KEPT = 4

    def __init__(self, weight: StoredWeight, weights: WeightFormat) -> None:
        self.weight = weight
        self.format = weights
        self.full: Linear | None = None
        self.restricted: OrderedDict[CandidateSet, Linear] = OrderedDict()

    def logits(self, rows: mx.array, wanted: CandidateSet | None) -> mx.array:
        """rows: [n, hidden] in the compute dtype -> float32[n, R]."""
        if wanted is None:
            return self._whole()(rows).astype(mx.float32)
        if len(wanted.ids) * self.MAX_SHARE > self.weight.rows:
            return self._whole()(rows).astype(mx.float32)[:, mx.array(wanted.ids.astype(np.int32))]
        return self._restrict(wanted)(rows).astype(mx.float32)

    def _whole(self) -> Linear:
        if self.full is None:
            self.full = self.format.build(self.weight)
        return self.full

    def _restrict(self, wanted: CandidateSet) -> Linear:
        if wanted not in self.restricted:
            self.restricted[wanted] = self.format.build(self.weight.select(wanted.ids))
            if len(self.restricted) > self.MAX_KEPT:
                self.restricted.popitem(last=False)
        self.restricted.move_to_end(wanted)
        return self.restricted[wanted]
