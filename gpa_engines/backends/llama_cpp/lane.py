"""One GGUF file at work: its streams of keys and values, and the decodes that fill them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpa_engines.backends.llama_cpp.columns import Columns
from gpa_engines.backends.llama_cpp.gguf_model import GgufModel
from gpa_engines.backends.llama_cpp.model_files import VocabularyRows
from gpa_engines.backends.llama_cpp.native import AbortFlag, ContextShape, NativeContext, NativeModel, Piece
from gpa_engines.backends.llama_cpp.streams import Division, Stream, Streams, divide
from gpa_engines.step_model import CandidateSet, SlotRequest, StepRow

MAX_COLUMNS = 8
"""Candidate sets whose columns are kept."""

FIRST_STREAMS = 4
"""Streams that a cache begins with. llama.cpp fills all of its memory at once, and most processes speak one text: all
the streams are made when more requests come than these serve."""

MOST_TOGETHER = 7
"""Single tokens of a K-quant that are computed at once: from eight on llama.cpp multiplies them in tiles, whose sums
are in another order."""

MIN_TOGETHER = 3
"""Single tokens from which one product of all is faster than one after the other: two took 74 ms at the released size
in Q8_0 on one core and 39 on two, one 25 and 18, four 106 and 54."""


@dataclass(frozen=True, slots=True)
class LaneOptions:
    """max_tokens, max_batch: of the cache. shape: of its contexts, whose streams and length are set as needed.

    together: whether tokens of several requests are computed at once. reuse: of prefixes. k_quant: whether products of
    eight rows and more go through other kernels. prompt_chunk: prompts come in pieces that end at its multiples.
    """

    max_tokens: int
    max_batch: int
    shape: ContextShape
    together: bool
    reuse: bool
    k_quant: bool
    prompt_chunk: int


class Lane:
    """A file, loaded when a request first needs it, and its cache: a task takes no memory for the files of others.

    load: loads the checked file. table: float[V, hidden], embeddings of the whole vocabulary for a file that has a part
    of it, else None. Such a file is fed with them throughout, also with what it generated itself: they are not rounded
    as its own rows are, and a prompt gives the same logits whichever of the two its ids came from.
    """

    def __init__(
        self,
        model: GgufModel,
        load: Callable[[], NativeModel],
        table: NDArray[np.floating] | None,
        options: LaneOptions,
        abort: AbortFlag,
    ) -> None:
        self.model = model
        self.vocabulary = VocabularyRows(model.gpa.ids)
        self._load = load
        self._native: NativeModel | None = None
        self._table = table
        self._options = options
        self._abort = abort
        self._context: NativeContext | None = None
        self._streams: Streams | None = None
        self._crowded = False
        self._most_streams = min(FIRST_STREAMS, options.max_batch)
        self._columns: OrderedDict[CandidateSet | None, Columns | None] = OrderedDict()

    @property
    def idle(self) -> bool:
        """Whether no request has a stream here."""
        return self._streams is None or self._streams.idle

    def columns(self, candidates: CandidateSet | None) -> Columns | None:
        """How this file's logits become those of the candidates; None when it lacks one of them.

        Without candidates they become those of the whole vocabulary, -inf where the file has none.
        """
        if candidates not in self._columns:
            self._columns[candidates] = self._find_columns(candidates)
            if len(self._columns) > MAX_COLUMNS:
                self._columns.popitem(last=False)
        self._columns.move_to_end(candidates)
        return self._columns[candidates]

    def native(self) -> NativeModel:
        """The loaded file. Raises CheckpointError for one that llama.cpp cannot load."""
        if self._native is None:
            self._native = self._load()
        return self._native

    def take(self, request: SlotRequest) -> Stream | None:
        """A stream, whose `held` says what of the prompt it has already; None while others are in the way.

        Raises CheckpointError for a file that llama.cpp cannot load, CapacityError when there is no memory for the
        cache.
        """
        if self.idle and (self._streams is None or self._crowded or request.positions > self._streams.division.length):
            self._divide(request.positions)
        assert self._streams is not None
        division = self._streams.division
        if request.positions > division.length or self._crowded:
            return None
        stream = self._streams.take(request.prompt, reuse=request.reuse and self._options.reuse)
        if stream is None:
            self._crowded = self._is_crowded(division, request.positions)
            return None
        self._ready.cut(stream.number, len(stream.held))
        return stream

    def release(self, stream: Stream) -> None:
        assert self._streams is not None
        self._streams.release(stream.number)

    def forget(self, stream: Stream, length: int) -> None:
        """Put a stream back to its first `length` positions."""
        del stream.held[length:]
        self._ready.cut(stream.number, length)

    def feed(self, work: Sequence[tuple[Stream, StepRow]]) -> list[NDArray[np.float32] | None]:
        """Feed rows of different streams; per row its logits as :meth:`StepModel.step` gives them.

        Raises StepInterrupted and errors, after which `forget` must put the streams back.
        """
        results: list[NDArray[np.float32] | None] = [None] * len(work)
        single = [index for index, (_, row) in enumerate(work) if len(row.ids) == 1]
        if len(single) < MIN_TOGETHER or not self._options.together:
            single = []
        # llama.cpp computes streams together whose numbers follow one another.
        single.sort(key=lambda index: work[index][0].number)
        groups = -(-len(single) // MOST_TOGETHER) if self._options.k_quant else 1
        for group in np.array_split(np.array(single, int), groups) if single else ():
            decoded = self._ready.decode([self._pieces(*work[index])[0] for index in group])
            for index, logits in zip(group, decoded, strict=True):
                results[index] = self._result(work[index][1], [self._select(work[index][1], logits)])
        for index in set(range(len(work))).difference(single):
            # Alone, because how a prompt is cut and multiplied must not depend on the neighbours.
            stream, row = work[index]
            parts = [self._select(row, self._ready.decode([piece])[0]) for piece in self._pieces(stream, row)]
            results[index] = self._result(row, parts)
        for stream, row in work:
            stream.held.extend(row.ids)
        return results

    @property
    def _ready(self) -> NativeContext:
        assert self._context is not None
        return self._context

    def _is_crowded(self, division: Division, positions: int) -> bool:
        """Whether to let the requests run out, to make a cache with more streams then."""
        if division.streams < self._divided(division.length).streams:
            self._most_streams = self._options.max_batch
            return True
        # Few long streams serve many short requests one after the other.
        return self._divided(positions).streams >= 2 * division.streams

    def _divided(self, positions: int) -> Division:
        return divide(self._options.max_tokens, self._options.max_batch, positions)

    def _divide(self, positions: int) -> None:
        """Make the cache, or make it anew; what it held is lost."""
        division = self._divided(positions)
        division = replace(division, streams=min(division.streams, self._most_streams))
        self._context = self._streams = None
        shape = replace(self._options.shape, streams=division.streams, length=division.length)
        self._context = NativeContext(self.native(), shape, self._abort)
        least = MOST_TOGETHER + 1 if self._options.k_quant else 2
        self._streams = Streams(division, chunk=self._options.prompt_chunk, least=least)
        self._crowded = False

    def _find_columns(self, candidates: CandidateSet | None) -> Columns | None:
        if candidates is None:
            ids = np.concatenate([np.arange(part.start, part.stop) for part in self.vocabulary.ids])
            return Columns(np.arange(len(ids)), ids, self.model.gpa.vocab_size)
        rows = self.vocabulary.rows(candidates.ids)
        return None if rows is None else Columns(rows, np.arange(len(rows)), len(rows))

    def _pieces(self, stream: Stream, row: StepRow) -> list[Piece]:
        """Cut a row where a decode takes no more tokens or gives no more logits; evenly, so that none is a single."""
        ids = np.asarray(row.ids, np.int64)
        rows = ids.astype(np.int32) if self._table is None else self._table[ids].astype(np.float32)
        wanted = np.asarray([len(ids) - 1] if row.logits == "last" else row.offsets, np.int64)
        shape = self._options.shape
        ends = [
            int(part[-1]) + 1 for part in np.array_split(wanted, -(-len(wanted) // shape.outputs) or 1) if len(part)
        ]
        ends = [*ends[:-1], len(ids)]
        pieces, start = [], 0
        for end in ends:
            count = -(-(end - start) // shape.chunk)
            for part in np.array_split(np.arange(start, end), count):
                first, last = int(part[0]), int(part[-1]) + 1
                inside = wanted[(wanted >= first) & (wanted < last)] - first
                pieces.append(Piece(stream.number, row.start + first, rows[first:last], inside.tolist()))
            start = end
        return pieces

    def _select(self, row: StepRow, logits: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The wanted columns of one decode's rows of logits, copied: they are valid until the next decode only."""
        columns = self.columns(row.candidates)
        assert columns is not None
        return columns.select(logits, len(logits))

    @staticmethod
    def _result(row: StepRow, parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32] | None:
        if row.logits == "none":
            return None
        return parts[-1][0] if row.logits == "last" else np.concatenate(parts)
