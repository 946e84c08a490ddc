"""The speech codec in ONNX Runtime: what tools/convert/to_onnx.py wrote, run without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.codec import Codes
from gpa_codecs.errors import BackendError, CheckpointError
from gpa_codecs.network_codec import PARTS, BiCodecSettings, Float32, GlmSettings, LazyPart, NetworkCodec
from gpa_codecs.onnx_folder import CONVERT, CodecFolder

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CPU = "CPUExecutionProvider"

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

        def part(name: str) -> LazyPart[_Chain]:
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

    def _load(self, part: str) -> _Chain:
        paths = self._folder.graphs(part, self.precision if part == "decoder" else "fp32")
        return _Chain([self._session(path) for path in paths])

    def _session(self, path: Path) -> InferenceSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()  # pyright: ignore[reportAttributeAccessIssue]
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Threads that wait for work sleep: an engine computes on the same cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # An arena and a plan keep what the longest clip took, for each length that was seen.
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = False
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=self._providers)
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{path} cannot be loaded ({reason}); convert the checkpoint again: {CONVERT} --overwrite"
            ) from error


class _Chain:
    """Graphs that run one after the other, each on what the one before it gave."""

    def __init__(self, sessions: Sequence[InferenceSession]) -> None:
        self._sessions = [([each.name for each in session.get_inputs()], session) for session in sessions]

    def __call__(self, *inputs: NDArray) -> NDArray:
        arrays: Sequence[Any] = inputs
        for names, session in self._sessions:
            arrays = session.run(None, dict(zip(names, arrays, strict=True)))
        return arrays[0]


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
