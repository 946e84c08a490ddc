"""From a command line to a `Setup`: checkpoint, token space, codec, and a baseline that is opened or made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from gpa_codecs.codec import SpeechCodec
from gpa_codecs.errors import BackendError, CheckpointError, GpaError
from gpa_conformance.baseline import Baseline, write_baseline
from gpa_conformance.baseline.writing import Progress
from gpa_conformance.cases import Case
from gpa_conformance.speech.material import UTTERANCES
from gpa_conformance.target import load_attribute, split_path
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.engine import Engine
from gpa_engines.registry import BACKENDS, backend_status, create_engine
from gpa_engines.speech.codec_files import TorchCodecFiles, find_codec_files
from gpa_engines.speech.loading import load_codec, open_model

REFERENCE = "torch"
"""The backend that baselines are made with, on a CPU in float32."""

OpenCodec = Callable[[], SpeechCodec]


def open_checkpoint(model: str) -> tuple[Checkpoint, str]:
    """The checkpoint with all parts, or with language model and tokenizer alone and why the others cannot be used.

    Raises CheckpointError for a language model or tokenizer that is missing or damaged.
    """
    try:
        return open_model(model), ""
    except CheckpointError as error:
        checkpoint = open_model(model, require=("lm", "tokenizer"))
        return checkpoint, f"the checkpoint's codec cannot be used: {error}"


def find_codec(checkpoint: Checkpoint, problem: str, spec: str | None) -> tuple[OpenCodec | None, str]:
    """What makes the codec, or None and the reason.

    spec: "torch", "onnx" (the export beside the checkpoint), or `package.module:factory` of (bicodec_dir, glm_dir);
    None takes torch where it is installed, else the export. problem: why the checkpoint's own codec cannot be used, or
    ""; an export can be all the same.
    """
    if problem and spec not in (None, "onnx"):
        return None, problem
    if spec not in (None, "torch", "onnx"):
        split_path("--codec", spec)
        factory = load_attribute("--codec", spec)
        return (lambda: _made_codec(factory, spec, checkpoint)), ""
    try:
        exported = spec == "onnx" or bool(problem)
        files = find_codec_files(checkpoint.root, prefer_torch=True, precision="auto" if exported else None)
    except (BackendError, CheckpointError) as error:
        if spec is not None:
            raise
        return None, problem or str(error)
    if spec == "torch" and not isinstance(files, TorchCodecFiles):
        raise BackendError(f"--codec torch needs torch: {backend_status(BACKENDS[REFERENCE]).remedy}")
    if isinstance(files, TorchCodecFiles):
        return (lambda: load_codec(checkpoint)), ""
    return (lambda: files.load("cpu", None)), ""


def _made_codec(factory: Callable[..., Any], spec: str, checkpoint: Checkpoint) -> SpeechCodec:
    codec = factory(checkpoint.bicodec_dir, checkpoint.glm_dir)
    if not isinstance(codec, SpeechCodec):
        raise BackendError(f"--codec {spec} gave {type(codec).__name__}, which is not a gpa_codecs.codec.SpeechCodec")
    return codec


def baseline_folder(given: Path | None) -> AbstractContextManager[Path]:
    """The folder of the baseline: the given one, or one that is made for this run and removed after it."""
    if given is not None:
        return nullcontext(given)
    check_reference("without --baseline one is made first, which")
    return _FolderInside(tempfile.TemporaryDirectory(prefix="gpa-baseline-"))


class _FolderInside(AbstractContextManager[Path]):
    """A path in a temporary folder, where nothing is yet."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str]) -> None:
        self._folder = folder

    def __enter__(self) -> Path:
        return Path(self._folder.name) / "baseline"

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def check_reference(what: str) -> None:
    """Raise BackendError unless baselines can be made here. what: begins the sentence, e.g. "making a baseline"."""
    status = backend_status(BACKENDS[REFERENCE])
    if status.state != "ready":
        raise BackendError(
            f"{what} needs {REFERENCE}: {status.remedy}; or make it where {REFERENCE} is (gpa-conformance baseline "
            "--model DIR --out BASE), carry the folder here and give --baseline BASE"
        )


async def make_baseline(
    checkpoint: Checkpoint,
    out: Path,
    open_codec: OpenCodec | None,
    cases: Sequence[Case],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    utterances: int = UTTERANCES,
) -> Baseline:
    """Record the answers of the reference engine. utterances: as in `write_baseline`. Raises GpaError."""

    def open_engine(folder: Path) -> Engine:
        return create_engine(REFERENCE, folder, device="cpu", dtype="float32", threads=threads)

    engine = open_engine(checkpoint.root)
    try:
        return await write_baseline(
            checkpoint, out, engine, open_codec, cases, progress, open_engine, utterances=utterances
        )
    finally:
        await engine.close()


def check_utterances(option: str, utterances: int) -> int:
    """The number of held-out utterances that was asked for. Raises GpaError for less than one."""
    if utterances < 1:
        raise GpaError(f"{option} is {utterances}; expected 1 or more")
    return utterances


def check_outputs(outputs: dict[str, Path | None]) -> None:
    """Say before the work starts that a report could not be written. outputs: path by option. Raises GpaError."""
    from gpa_codecs.audio import check_writable
    from gpa_codecs.errors import AudioError

    seen: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        if path.resolve() in seen:
            raise GpaError(f"{option} and {seen[path.resolve()]} name the same file {path}")
        seen[path.resolve()] = option
        try:
            check_writable(path)
        except AudioError as error:
            raise GpaError(f"{option} {error}") from error
