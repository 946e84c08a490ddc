"""The speech codec in ONNX Runtime: what tools/convert/to_onnx.py wrote, run without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.codec import HOP_LENGTH, Codes
from gpa_codecs.errors import BackendError, CheckpointError
from gpa_codecs.network_codec import PARTS, BiCodecSettings, Float32, GlmSettings, LazyPart, NetworkCodec
from gpa_codecs.onnx_folder import CONVERT, CodecFolder

CPU = "CPUExecutionProvider"

WINDOW = 150
"""Codes (3 s) that the wave generator decodes at once beside the context, which at the released size takes 10% of the
time. Longer windows take more memory: about 1 MB per code."""

LEAST_PAIR = 100
"""Codes from which two windows side by side are no slower than one on all cores, though both compute the context."""

Provider = str | tuple[str, dict[str, Any]]
"""A provider of ONNX Runtime by name, with its options where it is given some."""


class OnnxCodec(NetworkCodec):
    """The codec of a folder that tools/convert/to_onnx.py wrote; gives the tokens that the torch codec gives."""

    def __init__(
        self,
        folder: str | Path,
        *,
        precision: str = "auto",
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
    ) -> None:
        """Read the manifest; the graphs follow on demand.

        folder: the converter's --out, or the folder "codec" in it. precision: the decoder's, "auto" (fp32) or one that
        was exported; the encoders are float32, because fewer bits change tokens. threads: of each part while it runs;
        None takes OMP_NUM_THREADS, else the cores that this process may use. providers: of ONNX Runtime, best first,
        None is the CPU.

        Raises CheckpointError for a folder that is none or is damaged, and BackendError for a precision that was not
        exported, a provider that is not there, or without onnxruntime.
        """
        self._folder = CodecFolder.open(folder)
        self.precision = self._folder.decoder_precision(precision)
        """What the decoder computes in: "fp32", "fp16" or "int8"."""
        if find_spec("onnxruntime") is None:
            raise BackendError("the ONNX codec needs onnxruntime: pip install 'gpa-engines[onnx]'")
        if threads is not None and threads < 1:
            raise BackendError(f"threads is {threads}; expected 1 or more")
        self._threads = threads or _usable_threads()
        self._providers = _check_providers(providers)

        def part(name: str) -> LazyPart[Any]:
            return LazyPart(lambda: self._load(name))

        self._lazy = {name: part(name) for name in PARTS}

    @property
    def _bicodec_settings(self) -> BiCodecSettings:
        return self._folder.bicodec

    @property
    def _glm_settings(self) -> GlmSettings:
        return self._folder.glm

    @property
    def _shares_batches(self) -> bool:
        return False

    @property
    def _parts(self) -> dict[str, LazyPart]:
        return self._lazy

    def _semantic_codes(self, samples: Float32) -> Codes:
        features, encoder = self._lazy["wav2vec2"].get(), self._lazy["semantic"].get()
        return encoder(features(samples))

    def _voice_codes(self, mel: Float32) -> Codes:
        return self._lazy["voice"].get()(mel)

    def _glm_codes(self, log_mel: Float32, frames: int) -> Codes:
        return self._lazy["glm"].get()(log_mel, np.array(frames, dtype=np.int64))

    def _decoded(self, semantic: Codes, voices: Codes) -> Float32:
        return self._lazy["decoder"].get()(semantic, voices)

    def _load(self, part: str) -> _Network | _Decoder:
        if part != "decoder":
            (path,) = self._folder.graphs(part, "fp32")
            return self._network(path, self._threads)
        prenet, generator = self._folder.graphs(part, self.precision)
        return _Decoder(
            self._network(prenet, self._threads),
            LazyPart(lambda: self._network(generator, self._threads)),
            # The thread of the second window is the one that is left out.
            LazyPart(lambda: self._network(generator, self._threads - 1)) if self._in_pairs else None,
            self._folder.generator_context,
        )

    @property
    def _in_pairs(self) -> bool:
        return self._threads > 1 and self._providers == [CPU]

    def _network(self, path: Path, threads: int) -> _Network:
        return _Network(path, threads, self._providers)


class _Network:
    """One graph: arrays by its inputs' order in, its one output out."""

    def __init__(self, path: Path, threads: int, providers: list[Provider]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()  # pyright: ignore[reportAttributeAccessIssue]
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that wait for work sleep: an engine computes on the same cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A layout of blocked channels gains nothing here, and needs a copy of every tensor that it touches.
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # pyright: ignore[reportAttributeAccessIssue]
        options.graph_optimization_level = level
        # A memory plan would be kept for each length that is seen, and clips are seldom equally long.
        options.enable_mem_pattern = False
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{path} cannot be loaded ({reason}); convert the checkpoint again: {CONVERT} --overwrite"
            ) from error
        self._names = [each.name for each in self._session.get_inputs()]
        # The arena, without which every large tensor would cost page faults, gives back after each run what it took.
        self._options = onnxruntime.RunOptions()  # pyright: ignore[reportAttributeAccessIssue]
        self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def __call__(self, *inputs: NDArray) -> NDArray:
        return np.asarray(self._session.run(None, dict(zip(self._names, inputs, strict=True)), self._options)[0])


class _Decoder:
    """Prenet and generator. The generator, whose tensors grow to 100 times its input, runs window by window.

    alone: the generator for one window at a time. in_pairs: the same for two windows side by side, on a core less: a
    sine, of which there are many, is computed on one core. None where that gains nothing. Both are loaded when needed.
    context: codes on each side that a sample depends on in the generator; windows overlap by them, so that their
    middles together are what the whole gives, but for rounding. All windows compute equally many codes: those at the
    ends, which have a context on one side only, give that many more.
    """

    def __init__(
        self, prenet: _Network, alone: LazyPart[_Network], in_pairs: LazyPart[_Network] | None, context: int
    ) -> None:
        self._prenet, self._alone, self._in_pairs, self._context = prenet, alone, in_pairs, context

    def __call__(self, semantic: Codes, voices: Codes) -> Float32:
        latents = self._prenet(semantic, voices)
        length = latents.shape[2]
        windows = max(1, -(-(length - 2 * self._context) // WINDOW))
        if self._in_pairs is None or length < LEAST_PAIR:
            pieces = [self._window(self._alone.get(), latents, *each) for each in self._edges(length, windows)]
        else:
            generator, edges = self._in_pairs.get(), self._edges(length, windows + windows % 2)
            with ThreadPoolExecutor(2) as pool:
                pieces = list(pool.map(lambda each: self._window(generator, latents, *each), edges))
        return np.concatenate(pieces, axis=1)

    def _edges(self, length: int, windows: int) -> list[tuple[int, int]]:
        inner = np.linspace(self._context, length - self._context, windows + 1).astype(int).tolist()[1:-1]
        return list(pairwise([0, *inner, length]))

    def _window(self, generator: _Network, latents: Float32, start: int, end: int) -> Float32:
        first, last = max(0, start - self._context), min(latents.shape[2], end + self._context)
        pcm = generator(np.ascontiguousarray(latents[:, :, first:last]))
        return pcm[:, (start - first) * HOP_LENGTH : (end - first) * HOP_LENGTH]


def _usable_threads() -> int:
    """OMP_NUM_THREADS, as torch takes it, else the cores that this process may use.

    Left alone, ONNX Runtime counts the machine's cores and ties its threads to them.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_providers(providers: Sequence[Provider] | None) -> list[Provider]:
    if providers is None:
        return [CPU]
    import onnxruntime

    available = onnxruntime.get_available_providers()  # pyright: ignore[reportAttributeAccessIssue]
    for provider in providers:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise BackendError(f"ONNX Runtime has no provider {name!r} here; it has {', '.join(available)}")
    if not providers:
        raise BackendError(f"there is no provider; ONNX Runtime has {', '.join(available)}")
    return list(providers)
