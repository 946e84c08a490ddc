"""Writing a random checkpoint as a folder that appears whole or not at all, and the cached tiny one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gpa_codecs.errors import CheckpointError
from gpa_engines.cache_folder import cache_folder
from gpa_engines.random_checkpoint import configs, parameters
from gpa_engines.random_checkpoint.configs import Size
from gpa_engines.random_checkpoint.values import Tensor, write_safetensors
from gpa_engines.random_checkpoint.vocabulary import tokenizer_files

MARKER = "gpa_random_weights"
"""Key of config.json that says that the weights are random; its value holds `size` and `seed`."""

# Raised whenever the files of an equal (size, seed) change, so that a cached checkpoint of an older recipe is not used.
RECIPE = 1

Progress = Callable[[str, int, int], None]
"""Called as progress(file, bytes of weights written so far, bytes of weights in all)."""

_WAV2VEC2 = "BiCodec/wav2vec2-large-xlsr-53"
_GLM = "glm-4-voice-tokenizer"
_WEIGHTS = tuple(f"{folder}model.safetensors" for folder in ("", "BiCodec/", f"{_WAV2VEC2}/", f"{_GLM}/"))


@dataclass(frozen=True, slots=True)
class _Contents:
    """What goes into the folder: text files and weight files by their path inside it."""

    texts: dict[str, str]
    weights: dict[str, list[Tensor]]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.weights.values() for tensor in tensors)

    @property
    def names(self) -> set[str]:
        return {*self.texts, *self.weights}


def make_checkpoint(
    out: str | Path, size: Size, seed: int, *, overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """Write a complete random-weight checkpoint in the released layout into the new folder `out` and return its path.

    `full` has the released dimensions (about 3.8 GB), `tiny` is a few MB. Equal (size, seed) give equal bytes on every
    machine. The folder is written beside `out` and renamed, so an interruption or a full disk leaves nothing. An
    existing `out` is replaced only with `overwrite` and only if it holds nothing but files of such a checkpoint.
    Raises CheckpointError.
    """
    out = Path(os.path.abspath(out))
    if size not in configs.SIZES:
        raise CheckpointError(f"checkpoint size is {size!r}; expected one of {', '.join(configs.SIZES)}")
    contents = _contents(size, seed)
    _check_target(out, contents.names, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < contents.weight_bytes:
            raise OSError(errno.ENOSPC, f"{contents.weight_bytes:,} bytes needed, {free:,} free")
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            folder = temporary / out.name
            folder.mkdir()
            _fill(folder, contents, seed, progress)
            _move_into_place(folder, out, temporary / "replaced" if overwrite else None)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot write the checkpoint: {error.strerror or error}") from error
    return out


def tiny_random_checkpoint() -> Path:
    """The tiny random checkpoint (seed 0) in the user's cache folder; made on first use, a second or so.

    The folder is `$GPA_ENGINES_CACHE` or the platform's cache folder. Safe against several processes at once: each
    writes its own copy and the first rename wins. Raises CheckpointError.
    """
    out = cache_folder() / f"tiny-random-{RECIPE}"
    if not _is_whole(out):
        try:
            make_checkpoint(out, "tiny", 0, overwrite=is_random_checkpoint(out))
        except CheckpointError:
            if not _is_whole(out):  # else another process was faster
                raise
    return out


def is_random_checkpoint(folder: Path) -> bool:
    """Whether config.json in `folder` carries the marker of random weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and MARKER in config


def _contents(size: Size, seed: int) -> _Contents:
    lm = configs.language_model(size, seed)
    bicodec, wav2vec2, glm = configs.bicodec(size), configs.wav2vec2(size), configs.glm_tokenizer(size)
    # The speaker encoder's width is fixed, so half the bytes make the tiny checkpoint half as large.
    dtype = "BF16" if size == "tiny" else "F32"
    return _Contents(
        texts={
            "README.md": _model_card(size, seed),
            "config.json": _json(lm),
            "generation_config.json": _json(configs.generation(size)),
            **tokenizer_files(configs.vocabulary_layout(size)),
            "BiCodec/config.yaml": yaml.safe_dump(bicodec, sort_keys=False),
            f"{_WAV2VEC2}/config.json": _json(wav2vec2),
            f"{_WAV2VEC2}/preprocessor_config.json": _json(configs.wav2vec2_preprocessor()),
            f"{_GLM}/config.json": _json(glm),
            f"{_GLM}/preprocessor_config.json": _json(configs.glm_preprocessor(size)),
        },
        weights=dict(
            zip(
                _WEIGHTS,
                (
                    parameters.language_model(lm),
                    parameters.bicodec(bicodec, dtype=dtype),
                    parameters.wav2vec2(wav2vec2, dtype=dtype),
                    parameters.glm_tokenizer(glm, dtype=dtype),
                ),
                strict=True,
            )
        ),
    )


def _fill(folder: Path, contents: _Contents, seed: int, progress: Progress | None) -> None:
    for name, text in contents.texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))
    done = 0
    total = contents.weight_bytes
    for name, tensors in contents.weights.items():

        def advance(count: int, name: str = name) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(name, done, total)

        write_safetensors(folder / name, tensors, f"{seed}:{name}", advance=advance)


def _check_target(out: Path, names: set[str], overwrite: bool) -> None:
    """Refuse an `out` that exists, unless it may be replaced without losing anything of the user's."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise CheckpointError(f"{out} exists and is not a folder; give the path of a new folder")
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    if not present:
        return
    if not overwrite:
        raise CheckpointError(f"{out} exists; give another path, or --overwrite to replace a random checkpoint there")
    if not is_random_checkpoint(out):
        raise CheckpointError(
            f"{out} is not a checkpoint made by this tool (config.json has no {MARKER!r}); not replaced"
        )
    if foreign := sorted(present - names):
        raise CheckpointError(f"{out} also holds {foreign[0]!r}, which this tool did not write; not replaced")


def _move_into_place(folder: Path, out: Path, replaced: Path | None) -> None:
    """Rename `folder` to `out`; what is there becomes `replaced`, or, where that is None, must be an empty folder."""
    if replaced is None or not out.exists():
        if out.exists():
            out.rmdir()  # fails if another process has filled it meanwhile
        folder.rename(out)
        return
    old = out.rename(replaced)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise


def _is_whole(folder: Path) -> bool:
    needed = ("tokenizer.json", "BiCodec/config.yaml", *_WEIGHTS)
    return is_random_checkpoint(folder) and all((folder / name).is_file() for name in needed)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _model_card(size: Size, seed: int) -> str:
    return f"""# Random weights ({size}, seed {seed})

This folder has the layout of GPA's released checkpoint, but **its weights are random numbers**: whatever it
transcribes, speaks or converts is noise. It exists to try the software, to test it and to measure its speed.

Made by `tools/make_checkpoint.py OUT --size {size} --seed {seed}` of gpa-engines; the same command gives the same
bytes on every machine. Trained weights: Hugging Face `AutoArk-AI/GPA`, ModelScope `AutoArk/GPA`.
"""
