"""llama.cpp's C API as two objects, a model and a context, which check whatever would end the process.

The high-level class of llama-cpp-python is not used: it cannot turn extra buffers off, keeps the logits of a whole
context, and has a sampler of its own.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp.llama_cpp as llama  # pyright: ignore[reportMissingImports]
import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, CapacityError, CheckpointError
from gpa_engines.step_model import StepInterrupted

_F32, _F16 = 0, 1  # ggml's numbers of the types
_ABORTED, _NO_ROOM = 2, 1  # what llama_decode returns
_ERROR, _CONTINUED = 4, 5  # levels of a line of llama.cpp's log

_log: deque[str] = deque(maxlen=4)
_continues_error = False


@llama.llama_log_callback
def _keep_errors(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp prints hundreds of lines; only the last errors are kept, for our own messages."""
    global _continues_error
    line = text.decode("utf-8", errors="replace").strip()
    _continues_error = level == _ERROR or (level == _CONTINUED and _continues_error)
    if _continues_error and line:
        _log.append(line)


def start() -> None:
    """Silence llama.cpp and let it find its devices; calling again does no harm."""
    llama.llama_log_set(_keep_errors, ctypes.c_void_p(0))
    llama.llama_backend_init()


def supports_gpu() -> bool:
    """Whether the installed llama.cpp was built for a GPU, and there is one."""
    return bool(llama.llama_supports_gpu_offload())


def flash_type(wanted: bool | None) -> int:
    """llama.cpp's number for flash attention on, off, or as it decides."""
    if wanted is None:
        return llama.LLAMA_FLASH_ATTN_TYPE_AUTO
    return llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if wanted else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED


def _said() -> str:
    """llama.cpp's last errors, for the end of a message; forgets them."""
    lines = "; ".join(_log)
    _log.clear()
    return f" (llama.cpp: {lines})" if lines else ""


class AbortFlag:
    """Breaks off a decode from any thread.

    llama.cpp asks a C function between two operations. A Python function would wait for the interpreter's lock at each
    of them, so C's strlen is asked instead: the length of a text that is empty until the flag is set.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)
        library = ctypes.CDLL("msvcrt") if os.name == "nt" else ctypes.CDLL(None)
        self.callback = ctypes.cast(library.strlen, llama.ggml_abort_callback)
        self.data = ctypes.cast(self._text, ctypes.c_void_p)

    def __bool__(self) -> bool:
        return self._text.raw[0] != 0

    def set(self) -> None:
        self._text[0] = b"\1"

    def clear(self) -> None:
        self._text[0] = b"\0"


class NativeModel:
    """A loaded GGUF file, already checked. rows: ids of its vocabulary. width: elements of an embedding."""

    def __init__(self, path: Path, *, n_gpu_layers: int, extra_buffers: bool) -> None:
        params = llama.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = extra_buffers
        handle = llama.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise CheckpointError(f"{path}: llama.cpp cannot load it{_said()}; convert it again")
        self.handle = handle
        # At the end of the process the engine's thread may be in a decode, and the memory goes anyway.
        weakref.finalize(self, llama.llama_model_free, handle).atexit = False
        vocabulary = llama.llama_model_get_vocab(handle)
        assert vocabulary is not None
        self.path = path
        self.rows = llama.llama_vocab_n_tokens(vocabulary)
        self.width = llama.llama_model_n_embd(handle)


@dataclass(frozen=True, slots=True)
class ContextShape:
    """Sizes of a context. chunk: tokens of one decode. outputs: rows of logits of one decode.

    half: keys and values are float16, else float32. flash: llama.cpp's flash_attn_type.
    """

    streams: int
    length: int
    chunk: int
    outputs: int
    threads: int
    half: bool
    flash: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one stream for one decode.

    rows: of the file's vocabulary, or embeddings float32[n, width]. outputs: offsets of those whose logits are wanted.
    """

    stream: int
    start: int
    rows: NDArray[np.int32] | NDArray[np.float32]
    outputs: Sequence[int]


class NativeContext:
    """Streams of keys and values of one model, and the decode that fills them. Belongs to one thread."""

    def __init__(self, model: NativeModel, shape: ContextShape, abort: AbortFlag) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = shape.streams * shape.length
        params.n_seq_max = shape.streams
        params.kv_unified = False
        params.n_batch = params.n_ubatch = shape.chunk
        params.n_outputs_max = shape.outputs
        params.n_threads = params.n_threads_batch = shape.threads
        params.type_k = params.type_v = _F16 if shape.half else _F32
        params.flash_attn_type = shape.flash
        params.no_perf = True
        handle = llama.llama_init_from_model(model.handle, params)
        if not handle:
            raise CapacityError(
                f"{model.path.name}: llama.cpp makes no cache of {params.n_ctx} positions{_said()}: "
                "lower max_tokens_in_flight"
            )
        weakref.finalize(self, llama.llama_free, handle).atexit = False
        self._handle = handle
        self._model = model  # freed after the context
        self._abort = abort
        self.shape = shape
        llama.llama_set_abort_callback(handle, abort.callback, abort.data)
        memory = llama.llama_get_memory(handle)
        assert memory is not None
        self._memory = memory
        self._batch = _Batch(shape.chunk, shape.streams, model.width)

    def decode(self, pieces: Sequence[Piece]) -> list[list[NDArray[np.float32]]]:
        """Feed all pieces at once. Per piece its rows of logits, float32[rows of the file], valid until the next call.

        Raises StepInterrupted or BackendError, after which any number of the tokens may have been fed.
        """
        self._check(pieces)
        if self._abort:
            raise StepInterrupted("broken off between two decodes")
        code = llama.llama_decode(self._handle, self._batch.fill(pieces))
        if code == _ABORTED:
            raise StepInterrupted("broken off in a decode")
        if code == _NO_ROOM:
            raise BackendError(f"{self._model.path.name}: no room in llama.cpp's cache{_said()}")
        if code:
            raise BackendError(f"{self._model.path.name}: llama.cpp's decode failed with {code}{_said()}")
        results, before = [], 0
        for piece in pieces:
            results.append([self._logits(before + offset) for offset in piece.outputs])
            before += len(piece.rows)
        return results

    def cut(self, stream: int, length: int) -> None:
        """Forget what the stream holds from position `length` on."""
        llama.llama_memory_seq_rm(self._memory, stream, length, -1)

    def _logits(self, index: int) -> NDArray[np.float32]:
        pointer = llama.llama_get_logits_ith(self._handle, index)
        if not pointer:
            raise BackendError(f"{self._model.path.name}: llama.cpp has no logits of token {index}{_said()}")
        return np.ctypeslib.as_array(pointer, (self._model.rows,))

    def _check(self, pieces: Sequence[Piece]) -> None:
        """Raise ValueError for what llama.cpp answers by ending the process, or not at all."""
        shape = self.shape
        tokens, outputs = sum(len(piece.rows) for piece in pieces), sum(len(piece.outputs) for piece in pieces)
        _expect(0 < tokens <= shape.chunk, f"{tokens} tokens in a decode of at most {shape.chunk}")
        _expect(outputs <= shape.outputs, f"{outputs} rows of logits in a decode of at most {shape.outputs}")
        _expect(len({piece.rows.ndim for piece in pieces}) == 1, "tokens and embeddings in one decode")
        _expect(len({piece.stream for piece in pieces}) == len(pieces), "two pieces of one stream in a decode")
        for piece in pieces:
            _expect(0 <= piece.stream < shape.streams, f"stream {piece.stream} of {shape.streams}")
            end = piece.start + len(piece.rows)
            _expect(end <= shape.length, f"positions up to {end} in a stream of {shape.length}")
            held = llama.llama_memory_seq_pos_max(self._memory, piece.stream) + 1
            _expect(piece.start == held, f"position {piece.start} in a stream that holds {held}")
            if piece.rows.ndim == 1:
                inside = piece.rows.min(initial=0) >= 0 and piece.rows.max(initial=0) < self._model.rows
                _expect(inside, f"a token outside the file's {self._model.rows}")
            else:
                width = piece.rows.shape[1]
                _expect(width == self._model.width, f"embeddings of {width} elements, not {self._model.width}")
            inside = all(0 <= offset < len(piece.rows) for offset in piece.outputs)
            _expect(inside, f"logits of tokens {list(piece.outputs)} of {len(piece.rows)}")


def _expect(valid: bool, wrong: str) -> None:
    if not valid:
        raise ValueError(wrong)


class _Batch:
    """A llama_batch over NumPy's memory: filled by whole arrays instead of token by token."""

    def __init__(self, size: int, streams: int, width: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._embeddings = np.empty((size, width), np.float32)
        self._positions = np.zeros(size, np.int32)
        self._counts = np.ones(size, np.int32)
        self._streams = np.arange(streams, dtype=np.int32)
        self._stream_pointers = np.zeros(size, np.uintp)
        self._wanted = np.zeros(size, np.int8)

    def fill(self, pieces: Sequence[Piece]) -> llama.llama_batch:
        at = 0
        for piece in pieces:
            part = slice(at, at + len(piece.rows))
            (self._tokens if piece.rows.ndim == 1 else self._embeddings)[part] = piece.rows
            self._positions[part] = np.arange(piece.start, piece.start + len(piece.rows))
            self._stream_pointers[part] = self._streams.ctypes.data + 4 * piece.stream
            self._wanted[part] = 0
            self._wanted[at + np.asarray(piece.outputs, np.intp)] = 1
            at = part.stop
        embedded = pieces[0].rows.ndim == 2
        return llama.llama_batch(
            n_tokens=at,
            token=None if embedded else _pointer(self._tokens, ctypes.c_int32),
            embd=_pointer(self._embeddings, ctypes.c_float) if embedded else None,
            pos=_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_pointer(self._counts, ctypes.c_int32),
            seq_id=_pointer(self._stream_pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )


def _pointer(array: NDArray[np.generic], kind: type) -> object:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
