"""The ONNX Runtime step model: decoding rows share one run, every longer row has one of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gpa_engines.backends.onnx.exported import ExportedLM
from gpa_engines.backends.onnx.head import Head
from gpa_engines.backends.onnx.paged_cache import PagedCache
from gpa_engines.backends.onnx.runtime import Run, Session
from gpa_engines.backends.onnx.tables import Table
from gpa_engines.step_model import Slot, SlotRequest, StepInterrupted, StepRow

PAGE = 64
"""Positions of a page of the cache: smaller ones mean more products, larger ones more masked positions in them."""


class OnnxStepModel:
    """A :class:`~gpa_engines.step_model.StepModel` in ONNX Runtime; may be interrupted."""

    def __init__(
        self,
        exported: ExportedLM,
        *,
        provider: str,
        threads: int | None,
        max_tokens: int,
        max_batch: int,
        page: int = PAGE,
    ) -> None:
        config = exported.config
        self.vocab_size = config.vocab_size
        self.max_context = config.max_position_embeddings
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self._embedding = Table(
            exported.table("embedding"), exported.scales("embedding"), config.vocab_size, config.hidden_size
        )
        head_table = self._embedding
        if not config.tie_word_embeddings:
            head_table = Table(
                exported.table("lm_head"), exported.scales("lm_head"), config.vocab_size, config.hidden_size
            )
        self._body = Session(exported.body, provider, threads)
        self._head = Head(exported, head_table, provider, threads)
        self.cache = PagedCache(
            config.num_hidden_layers, config.num_key_value_heads, config.head_dim, max_tokens, max_batch, page
        )
        self._run: Run | None = None

    def allocate(self, request: SlotRequest) -> Slot | None:
        number = self.cache.allocate(request.positions)
        return None if number is None else Slot(number)

    def release(self, slot: int) -> None:
        self.cache.release(slot)

    def interrupt(self) -> None:
        """See :class:`~gpa_engines.step_model.Interruptible`."""
        run = self._run
        if run is not None:
            run.stop()

    def step(self, rows: Sequence[StepRow]) -> list[NDArray[np.float32] | None]:
        """See :class:`~gpa_engines.step_model.StepModel`.

        A run that is interrupted leaves what earlier runs of the step wrote; that lies behind every slot's end, and
        the repeated step writes the same again.
        """
        results: list[NDArray[np.float32] | None] = [None] * len(rows)
        decoding = [index for index, row in enumerate(rows) if len(row.ids) == 1]
        groups = ([decoding] if decoding else []) + [[i] for i, row in enumerate(rows) if len(row.ids) > 1]
        with self._interruptible() as run:
            for group in groups:
                outcome = self._forward([rows[index] for index in group], run)
                for index, logits in zip(group, outcome, strict=True):
                    results[index] = logits
        return results

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[Run]:
        self._run = run = Run()
        try:
            yield run
        except Exception as error:
            if run.stopped:
                raise StepInterrupted("the step was interrupted") from error
            raise
        finally:
            self._run = None

    def _forward(self, rows: Sequence[StepRow], run: Run) -> list[NDArray[np.float32] | None]:
        """Rows of equally many ids."""
        count = len(rows[0].ids)
        ids = np.array([row.ids for row in rows], np.int64)
        slots, starts = [row.slot for row in rows], [row.start for row in rows]
        pages = self.cache.view(slots, starts, exclusive=count > 1)
        wanted = [index * count + offset for index, row in enumerate(rows) for offset in _wanted(row)]
        inputs = {
            "embeddings": self._embedding.rows(ids.ravel()).reshape(*ids.shape, -1),
            "positions": np.array(starts, np.int64)[:, None] + np.arange(count),
            "causal": np.triu(np.full((count, count), -np.inf, np.float32), 1),
            "owner": pages.owner,
            "ownership": pages.ownership,
            "page_mask": pages.mask,
            "wanted": np.array(wanted, np.int64),
        }
        for layer, (keys, values) in enumerate(zip(pages.keys, pages.values, strict=True)):
            inputs[f"keys.{layer}"], inputs[f"values.{layer}"] = keys, values
        hidden, new_keys, new_values = self._body.run(inputs, run)
        self.cache.write(slots, starts, new_keys, new_values)
        return self._logits(rows, hidden)

    def _logits(self, rows: Sequence[StepRow], hidden: NDArray[np.float32]) -> list[NDArray[np.float32] | None]:
        """hidden: the wanted positions of all rows, in their order."""
        results: list[NDArray[np.float32] | None] = [None] * len(rows)
        ends = np.cumsum([len(_wanted(row)) for row in rows])
        last = [index for index, row in enumerate(rows) if row.logits == "last"]
        if last:
            logits = self._head.last_logits(hidden[ends[last] - 1], [rows[index].candidates for index in last])
            for index, row_logits in zip(last, logits, strict=True):
                results[index] = row_logits
        for index, row in enumerate(rows):
            if row.logits == "at":
                part = hidden[ends[index] - len(row.offsets) : ends[index]]
                results[index] = self._head.all_logits(part, row.candidates)
        return results


def _wanted(row: StepRow) -> Sequence[int]:
    """Offsets of the row's ids whose logits are wanted."""
    return {"none": (), "last": (len(row.ids) - 1,), "at": row.offsets}[row.logits]
