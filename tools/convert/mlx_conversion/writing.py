"""Writing what was planned into a folder that appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from gpa_codecs.errors import CheckpointError, GpaError
from gpa_codecs.weights import SAFETENSORS, read_header, weight_files
from gpa_engines import __version__
from gpa_engines.backends.mlx.conversion import KEY as RECORD_KEY
from gpa_engines.backends.mlx.conversion import ConversionRecord, families_of
from gpa_engines.backends.mlx.device import DTYPES
from gpa_engines.backends.mlx.linear import quantize
from gpa_engines.backends.mlx.weights import FLOATS, TOKENIZER, file_sha256
from gpa_engines.checkpoint.mlx_quantization import KEY as QUANTIZATION_KEY
from gpa_engines.checkpoint.mlx_quantization import Quantization, companions

from .plan import COPIED, Plan

Progress = Callable[[str, int, int], None]
"""Called as progress(what is done now, tensors done, tensors in all)."""

Inspection = Callable[[Path], None]
"""Called with the finished folder before it takes its name; what it raises keeps it from being there."""

_BYTES = {"F32": 4, "U32": 4, "BF16": 2, "F16": 2}


def check_target(out: Path) -> None:
    """Raise GpaError unless `out` can become a new folder."""
    if os.path.lexists(out):
        if out.is_symlink() or not out.is_dir():
            raise GpaError(f"--out {out} exists and is not a folder; name a new folder")
        if any(out.iterdir()):
            raise GpaError(f"--out {out} exists and is not empty; name a new folder")
    if not out.parent.is_dir():
        raise GpaError(f"--out {out}: there is no folder {out.parent}; create it first")


def write_plan(plan: Plan, out: Path, progress: Progress, inspect: Inspection) -> None:
    """Write the folder `out`. Raises GpaError, and whatever `inspect` raises; nothing is left then."""
    out = Path(os.path.abspath(out))
    check_target(out)
    try:
        _check_space(plan, out.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name[:32]}.", suffix=".partial", dir=out.parent))
        try:
            folder = temporary / "folder"
            folder.mkdir()
            _fill(plan, folder, progress)
            inspect(folder)
            _sync(folder)
            if out.exists():
                out.rmdir()  # fails if another process has filled it meanwhile
            folder.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _sync_entry(out.parent)
    except OSError as error:
        raise GpaError(f"--out {out} could not be written: {error.strerror or error}; nothing is left of it") from error


def _fill(plan: Plan, folder: Path, progress: Progress) -> None:
    source = plan.source.path
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    record = ConversionRecord(
        converter=__version__,
        tokenizer_sha256=file_sha256(source / TOKENIZER),
        weights_sha256={file.name: file_sha256(file) for file in weight_files(source)},
        families=families_of(plan.space),
    )
    (folder / "config.json").write_text(json.dumps(_config(plan, record), indent=2) + "\n", encoding="utf-8")
    # Metal rounds the quotients of a group otherwise: one machine's folder should be every machine's.
    with mx.stream(mx.cpu):
        arrays = _convert(plan, progress)
        progress(SAFETENSORS, len(plan.shapes), len(plan.shapes))
        try:
            mx.save_safetensors(str(folder / SAFETENSORS), arrays, metadata={"format": "mlx"})
        except RuntimeError as error:
            raise OSError(errno.EIO, str(error)) from error
    try:
        read_header(folder / SAFETENSORS)
    except CheckpointError as error:  # MLX does not look whether all of it was written
        raise OSError(errno.EIO, "the file is not whole; is the disk full?") from error


def _config(plan: Plan, record: ConversionRecord) -> dict[str, object]:
    """The source's config.json, with what mlx-lm insists on, and our sections."""
    config = dict(plan.values)
    config |= {"head_dim": plan.source.config.head_dim, "rms_norm_eps": plan.source.config.rms_norm_eps}
    config["tie_word_embeddings"] = plan.source.config.tie_word_embeddings
    if plan.dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = FLOATS[plan.dtype]
    if plan.quantization is not None:
        config[QUANTIZATION_KEY] = plan.quantization.to_config()
    config[RECORD_KEY] = record.to_config()
    return config


def _convert(plan: Plan, progress: Progress) -> dict[str, mx.array]:
    """Every tensor that is written. Raises CheckpointError for one that is not finite, before or after."""
    tensors = plan.source.read()
    written = dict[str, mx.array]()
    for done, (name, shape) in enumerate(plan.shapes.items()):
        progress(name, done, len(plan.shapes))
        weight = tensors.matrix(name).weight
        arrays = convert_tensor(name, weight, len(shape) == 2, plan.quantization, plan.dtype)
        finite = mx.all(mx.isfinite(weight))
        fits = mx.all(mx.stack([mx.all(mx.isfinite(array)) for array in arrays.values()]))
        mx.eval(list(arrays.values()), finite, fits)
        if not finite.item():
            raise CheckpointError(f"{plan.source.path}: {name} holds values that are no numbers; download it again")
        if not fits.item():
            largest = number(mx.max(mx.abs(weight.astype(mx.float32))))
            raise GpaError(f"{name} holds values up to {largest:.4g}, too large for --dtype float16; use bfloat16")
        written |= arrays
    return written


def convert_tensor(
    name: str, weight: mx.array, matrix: bool, quantization: Quantization | None, dtype: str | None
) -> dict[str, mx.array]:
    """The tensors that stand for one of the source; not evaluated yet."""
    if quantization is None:
        return {name: weight if dtype is None else weight.astype(DTYPES[FLOATS[dtype]])}
    if not matrix:
        return {name: weight.astype(mx.float32)}
    return dict(zip((name, *companions(name)), quantize(weight, quantization).arrays, strict=True))


def number(scalar: mx.array) -> float:
    """A real scalar of MLX as Python's."""
    return float(np.array(scalar.astype(mx.float32)))


def _check_space(plan: Plan, parent: Path) -> None:
    needed = 0
    for dtype, shape in plan.stored.values():
        size = _BYTES[dtype]
        for extent in shape:
            size *= extent
        needed += size
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes needed, {free:,} free")


def _sync(folder: Path) -> None:
    """Let the disk have every file, and the folder's own entries."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    _sync_entry(folder)


def _sync_entry(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
