"""The llama.cpp step model, and the engine made of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, RequestError
from gpa_engines.backends.llama_cpp import native
from gpa_engines.backends.llama_cpp.cpu import default_threads, is_x86
from gpa_engines.backends.llama_cpp.embedding_table import open_table
from gpa_engines.backends.llama_cpp.gguf_model import GgufModel
from gpa_engines.backends.llama_cpp.lane import Lane, LaneOptions
from gpa_engines.backends.llama_cpp.model_files import CONVERT, choose_files, dtype_name
from gpa_engines.backends.llama_cpp.native import AbortFlag, ContextShape, NativeModel
from gpa_engines.backends.llama_cpp.streams import Stream
from gpa_engines.engine import EngineInfo
from gpa_engines.step_engine import CAPABILITIES, INVARIANT, StepEngine
from gpa_engines.step_model import Slot, SlotRequest, StepInterrupted, StepRow

MAX_BATCH = 256
"""llama.cpp's LLAMA_MAX_SEQ."""

MAX_CHUNK = 512
"""Tokens of one decode: the buffers of a larger one cost memory and save no time."""

MIN_OUTPUTS = 16
"""Rows of logits of one decode: the buffers of a full vocabulary take 0.7 MiB for each, twice."""

UNROUNDED = ("float32", "float16", "bfloat16")
"""Dtypes whose products are of floats; the others' are of integers."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of :func:`gpa_engines.backends.llama_cpp.create_engine`."""

    dtype: str
    mode: str
    threads: int | None
    max_tokens_in_flight: int
    max_batch: int
    prefill_chunk: int
    n_gpu_layers: int
    flash_attention: bool | None
    prefix_reuse: bool

    def check(self) -> None:
        """Raise BackendError for a value that cannot be had."""
        sizes = {name: getattr(self, name) for name in ("max_tokens_in_flight", "max_batch", "prefill_chunk")}
        for name, value in (sizes | ({} if self.threads is None else {"threads": self.threads})).items():
            if value < 1:
                raise BackendError(f"{name} is {value}; expected at least 1")
        if self.max_batch > MAX_BATCH:
            raise BackendError(f"max_batch is {self.max_batch}; llama.cpp has at most {MAX_BATCH} sequences")
        if self.mode not in ("auto", "exact", "fast"):
            raise BackendError(f"mode is {self.mode!r}; expected 'auto', 'exact' or 'fast'")
        if self.n_gpu_layers < -1:
            raise BackendError(f"n_gpu_layers is {self.n_gpu_layers}; expected -1 (all), 0 or a number of layers")


class LlamaStepModel:
    """A :class:`~gpa_engines.step_model.StepModel` over GGUF files of one checkpoint.

    lanes: the files, those with fewer ids first. A request goes to the first that has all its candidates; one for the
    logits of every id goes to the file of the full vocabulary or, without one, to all.
    """

    def __init__(self, lanes: Sequence[Lane], abort: AbortFlag, *, max_tokens: int, max_batch: int) -> None:
        self.lanes = list(lanes)
        self.vocab_size = lanes[0].model.gpa.vocab_size
        self.max_context = min(lane.model.config.max_position_embeddings for lane in lanes)
        self.max_tokens = max_tokens
        self.max_batch = max_batch
        self._abort = abort
        self._seats: dict[int, list[tuple[Lane, Stream]]] = {}
        self._next_slot = 0

    def allocate(self, request: SlotRequest) -> Slot | None:
        """Raises RequestError for candidates that no file has all of, CapacityError when memory is short."""
        places: list[tuple[Lane, Stream]] = []
        with contextlib.ExitStack() as undo:
            for lane in self._serving(request):
                stream = lane.take(request)
                if stream is None:
                    return None
                places.append((lane, stream))
                undo.callback(lane.release, stream)
            undo.pop_all()
        number = self._next_slot
        self._next_slot += 1
        self._seats[number] = places
        filled = min(len(stream.held) for _, stream in places)
        for lane, stream in places:
            lane.forget(stream, filled)
        return Slot(number, filled)

    def release(self, slot: int) -> None:
        for lane, stream in self._seats.pop(slot):
            lane.release(stream)

    def step(self, rows: Sequence[StepRow]) -> list[NDArray[np.float32] | None]:
        """See :class:`~gpa_engines.step_model.StepModel`."""
        results: list[NDArray[np.float32] | None] = [None] * len(rows)
        try:
            for lane in self.lanes:
                work = [
                    (index, stream, row)
                    for index, row in enumerate(rows)
                    for place, stream in self._seats[row.slot]
                    if place is lane
                ]
                fed = lane.feed([(stream, row) for _, stream, row in work])
                for (index, _, _), logits in zip(work, fed, strict=True):
                    results[index] = _joined(results[index], logits)
        except BaseException as error:
            for row in rows:
                for lane, stream in self._seats[row.slot]:
                    lane.forget(stream, row.start)
            if isinstance(error, StepInterrupted):
                self._abort.clear()
            raise
        return results

    def interrupt(self) -> None:
        """See :class:`~gpa_engines.step_model.Interruptible`."""
        self._abort.set()

    def _serving(self, request: SlotRequest) -> list[Lane]:
        if request.candidates is None:
            full = [lane for lane in self.lanes if lane.model.gpa.vocab == "full"]
            return full or self.lanes
        for lane in self.lanes:
            if lane.columns(request.candidates) is not None:
                return [lane]
        loaded = " and ".join(f"{lane.model.path.name} ({lane.model.gpa.vocab})" for lane in self.lanes)
        raise RequestError(
            f"no loaded file has all {len(request.candidates.ids)} ids that the answer may hold: {loaded}; "
            f"a file that has: {CONVERT} --vocab full"
        )


def _joined(first: NDArray[np.float32] | None, second: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """Logits of two files, each -inf where it has none."""
    if first is None or second is None:
        return second if first is None else first
    return np.maximum(first, second)


def build_engine(model: Path, settings: Settings) -> StepEngine:
    """What :func:`gpa_engines.backends.llama_cpp.create_engine` does, once llama_cpp may be imported."""
    info, step_model = load_model(model, settings)
    return StepEngine(info, step_model, prefill_chunk=settings.prefill_chunk)


def load_model(model: Path, settings: Settings) -> tuple[EngineInfo, LlamaStepModel]:
    """Choose, check and load the files. Raises BackendError and CheckpointError."""
    settings.check()
    native.start()
    if settings.n_gpu_layers != 0 and not native.supports_gpu():
        raise BackendError(
            f"n_gpu_layers is {settings.n_gpu_layers}, but the installed llama-cpp-python has no GPU: build it for one "
            "(for CUDA: CMAKE_ARGS=-DGGML_CUDA=on pip install --no-binary :all: llama-cpp-python), or leave it 0"
        )
    models = choose_files(model, settings.dtype)
    dtype = dtype_name(models[0].file_type)
    exact = settings.mode == "exact" or (settings.mode == "auto" and dtype == "float32")
    if exact and settings.flash_attention:
        raise BackendError("flash_attention sums in float16, so it cannot be on in mode 'exact'; leave one of them out")
    abort = AbortFlag()
    options = _lane_options(settings, exact, dtype)
    lanes = [_open_lane(each, settings.n_gpu_layers, options, abort) for each in models]
    lanes.sort(key=lambda lane: lane.model.gpa.rows)
    if len(lanes) == 1:
        lanes[0].native()  # it will be needed: what is wrong with it is said now
    step_model = LlamaStepModel(lanes, abort, max_tokens=settings.max_tokens_in_flight, max_batch=settings.max_batch)
    info = EngineInfo(
        "llama-cpp",
        "gpu" if settings.n_gpu_layers else "cpu",
        dtype,
        step_model.vocab_size,
        step_model.max_context,
        CAPABILITIES if settings.n_gpu_layers else INVARIANT,
        note=_note(models, exact),
        logit_ids=_logit_ids(models),
        tokenizer_sha256=models[0].gpa.tokenizer_sha256,
    )
    return info, step_model


def _lane_options(settings: Settings, exact: bool, dtype: str) -> LaneOptions:
    """Tokens of several requests are computed together only where each then gets, to the last bit, what it gets alone.

    Of the CPU kernels those for quantised weights on x86 are so, if no weights are repacked (K-quants for up to seven
    rows): their products are of integers and each block's is added in turn. A float row by itself is summed in another
    order than several. A GPU's kernels make that difference too, but one request at a time would waste most of a GPU.
    """
    together = settings.n_gpu_layers != 0 or (is_x86() and dtype not in UNROUNDED)
    flash = settings.flash_attention
    if flash is None and not settings.n_gpu_layers:
        flash = False
    chunk = max(min(settings.prefill_chunk, MAX_CHUNK), settings.max_batch)
    shape = ContextShape(
        streams=0,
        length=0,
        chunk=chunk,
        outputs=min(chunk, max(settings.max_batch, MIN_OUTPUTS)),
        threads=settings.threads or default_threads(),
        half=not exact,
        flash=native.flash_type(False if exact else flash),
    )
    return LaneOptions(
        max_tokens=settings.max_tokens_in_flight,
        max_batch=settings.max_batch,
        shape=shape,
        together=together and not exact,
        reuse=settings.prefix_reuse and not exact,
        k_quant=not settings.n_gpu_layers and dtype.endswith(("_k", "_k_m")),
        prompt_chunk=settings.prefill_chunk,
    )


def _open_lane(model: GgufModel, n_gpu_layers: int, options: LaneOptions, abort: AbortFlag) -> Lane:
    """The file with its embedding table.

    ggml's extra buffers hold weights that were repacked for other kernels. On x86 they gain nothing here (Q4_K_M
    decodes more slowly with them), take memory beside the mapped file, and crash on CPUs with AMX: compiled by GCC 12,
    those kernels end the process as soon as a quantised batch has more than one token.
    """
    table = None
    if model.embeddings_path is not None:
        table = open_table(
            model.embeddings_path,
            shape=(model.gpa.vocab_size, model.config.hidden_size),
            source_sha256=model.gpa.source_sha256,
            tokenizer_sha256=model.gpa.tokenizer_sha256,
        )
    load = functools.partial(NativeModel, model.path, n_gpu_layers=n_gpu_layers, extra_buffers=not is_x86())
    return Lane(model, load, table, options, abort)


def _logit_ids(models: Sequence[GgufModel]) -> tuple[range, ...] | None:
    """The ids of all files together, None with a full vocabulary."""
    if any(model.gpa.vocab == "full" for model in models):
        return None
    joined: list[range] = []
    for part in sorted((part for model in models for part in model.gpa.ids), key=lambda part: part.start):
        if joined and part.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, part.stop))
        else:
            joined.append(part)
    return tuple(joined)


def _note(models: Sequence[GgufModel], exact: bool) -> str:
    names = ", ".join(f"{model.path.name} ({model.gpa.vocab})" for model in models)
    notes = [f"{names}; mode {'exact' if exact else 'fast'}"]
    if _logit_ids(models) is not None:
        notes.append(f"other answers need another file: {CONVERT} --vocab full")
    if foreign := [model.path.name for model in models if not model.gpa.converter]:
        notes.append(
            f"{foreign[0]} was not made by to_gguf.py: whether its tokenizer is the checkpoint's is not checked"
        )
    return "; ".join(notes)
