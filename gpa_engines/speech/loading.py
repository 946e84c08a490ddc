"""From a model's name to an engine, a codec and a token space that belong together."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from gpa_codecs.codec import SpeechCodec
from gpa_codecs.prompts import Task
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.checkpoint import PARTS, TASK_PARTS, Checkpoint, Part
from gpa_engines.engine import Engine
from gpa_engines.hub import resolve_model
from gpa_engines.registry import create_engine, require_backend


def load_parts(
    checkpoint: Checkpoint, backend: str, codec_device: str, engine_options: dict[str, Any]
) -> tuple[Engine, SpeechCodec, TokenSpace]:
    """Load the engine; the codec loads its own parts when a task first needs them.

    codec_device: "auto" puts the codec where the engine is.
    """
    require_backend(backend)
    space = checkpoint.token_space()
    engine = create_engine(backend, checkpoint.root, **engine_options)
    device = engine.info.device if codec_device == "auto" else codec_device
    return engine, load_codec(checkpoint, device), space


def load_codec(checkpoint: Checkpoint, device: str = "cpu", threads: int | None = None) -> SpeechCodec:
    """The codec of a checkpoint on a torch device; nothing is read from disk until it is needed.

    threads: torch's, of the whole process; None leaves them alone.
    """
    from gpa_codecs.torch_codec import TorchCodec

    return TorchCodec(checkpoint.bicodec_dir, checkpoint.glm_dir, device=device, threads=threads)


def open_model(
    model: str | Path,
    *,
    bicodec: Path | None = None,
    glm_tokenizer: Path | None = None,
    tokenizer: Path | None = None,
    require: Collection[Part] = PARTS,
) -> Checkpoint:
    """A checkpoint by folder, hub id or "tiny-random"; the other arguments are those of Checkpoint.open."""
    return Checkpoint.open(
        resolve_model(str(model)), bicodec=bicodec, glm_tokenizer=glm_tokenizer, tokenizer=tokenizer, require=require
    )


def parts_of(tasks: Collection[Task]) -> set[Part]:
    """The parts of a checkpoint that these tasks read."""
    return {part for task in tasks for part in TASK_PARTS[task]}
