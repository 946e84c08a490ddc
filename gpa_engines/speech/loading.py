"""From a model's name to an engine, a codec and a token space that belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpa_codecs.codec import SpeechCodec
from gpa_codecs.errors import CheckpointError
from gpa_codecs.prompts import Task
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.backend_choice import AUTO, Choice, choose_backend, is_quantized
from gpa_engines.checkpoint import PARTS, TASK_PARTS, Checkpoint, Part
from gpa_engines.checkpoint.speech_domain import SpeechDomain, find_speech_domain
from gpa_engines.engine import Engine, EngineInfo
from gpa_engines.hub import resolve_model
from gpa_engines.registry import create_engine, require_backend
from gpa_engines.speech.codec_files import CodecFiles, TorchCodecFiles, find_codec_files

CODEC_PARTS: tuple[Part, ...] = ("bicodec", "wav2vec2", "glm")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a model is loaded from, checked as far as it can be without loading it.

    engine: folder or file that the backend loads. checkpoint: the folder of the tokenizer and, where the codec or the
    backend reads them, of the released networks. codec: None where no task needs one. choice: the backend and why.
    domain: what the model can speak, None where that is any text.
    """

    engine: Path
    checkpoint: Checkpoint
    codec: CodecFiles | None
    choice: Choice
    domain: SpeechDomain | None = None

    def load(self, codec_device: str, engine_options: dict[str, Any]) -> tuple[Engine, SpeechCodec, TokenSpace]:
        """Load the engine; the codec loads its own parts when a task first needs them.

        codec_device: "auto" puts a torch codec where a torch engine is, and on the CPU beside any other.
        """
        assert self.codec is not None
        space = self.checkpoint.token_space()
        engine = self.load_engine(space, engine_options)
        device = codec_device
        if device == "auto":
            device = engine.info.device if self.choice.name == "torch" else "cpu"
        codec = self.codec.load(device, engine_options.get("threads"))
        check_codebooks(codec, self.codec, space)
        return engine, codec, space

    def load_engine(self, space: TokenSpace, engine_options: dict[str, Any]) -> Engine:
        """The engine alone. Raises CheckpointError where its model was made for another tokenizer than `space`'s."""
        engine = create_engine(self.choice.name, self.engine, **engine_options)
        check_vocabulary(engine.info, self.checkpoint, space)
        return engine


def find_model(
    model: str | Path,
    *,
    backend: str = AUTO,
    parts: Collection[Part] = PARTS,
    codec: Path | None = None,
    codec_precision: str | None = None,
    bicodec: Path | None = None,
    glm_tokenizer: Path | None = None,
    tokenizer: Path | None = None,
) -> ModelFiles:
    """The files of a model that is named by folder, .gguf file, hub id, "demo" or "tiny-random".

    parts: of the checkpoint, that the tasks will read. codec: the folder of the codec where it is not the model's: a
    checkpoint, or what tools/convert/to_onnx.py wrote. codec_precision: of an exported codec's decoder. The rest
    replaces single parts, as in Checkpoint.open. Raises GpaError for whatever is missing or does not fit.
    """
    path = resolve_model(str(model))
    folder = model_folder(path)
    choice = choose_backend(path) if backend == AUTO else Choice(require_backend(backend).name, "asked for")
    if path.is_file() and choice.name != "llama-cpp":
        raise CheckpointError(f"{path} is a GGUF file, which backend {choice.name!r} cannot read: use llama-cpp")
    files = None
    if set(parts) & set(CODEC_PARTS):
        files = find_codec_files(
            codec or folder,
            prefer_torch=choice.name == "torch",
            precision=codec_precision,
            bicodec=bicodec,
            glm_tokenizer=glm_tokenizer,
        )
    needed: set[Part] = {"tokenizer"}
    if not require_backend(choice.name).own_format:
        if is_quantized(folder):
            raise CheckpointError(f"{folder} holds weights quantised for MLX, which only backend 'mlx' can read")
        needed.add("lm")
    if isinstance(files, TorchCodecFiles):
        needed |= set(parts) & set(CODEC_PARTS)
        bicodec, glm_tokenizer = files.bicodec_dir, files.glm_dir
    elif files is not None:
        files.check(parts)
    checkpoint = Checkpoint.open(
        folder,
        bicodec=bicodec,
        glm_tokenizer=glm_tokenizer,
        tokenizer=tokenizer or _tokenizer(folder, codec or folder),
        require=needed,
    )
    domain = find_speech_domain(folder) or (find_speech_domain(codec) if codec is not None else None)
    return ModelFiles(path, checkpoint, files, choice, domain)


def find_codec(
    folder: Path,
    parts: Collection[Part],
    *,
    codec: Path | None = None,
    codec_precision: str | None = None,
    bicodec: Path | None = None,
    glm_tokenizer: Path | None = None,
) -> CodecFiles:
    """The codec alone of the model in `folder`, for work without the language model; arguments as in find_model."""
    files = find_codec_files(
        codec or folder,
        prefer_torch=True,
        precision=codec_precision,
        bicodec=bicodec,
        glm_tokenizer=glm_tokenizer,
    )
    if isinstance(files, TorchCodecFiles):
        Checkpoint.open(folder, bicodec=files.bicodec_dir, glm_tokenizer=files.glm_dir, require=parts)
    else:
        files.check(parts)
    return files


def model_folder(path: Path) -> Path:
    """The folder that a model's path stands for: itself, or that of a .gguf file, without a last part "gguf"."""
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == "gguf" else path.parent


def check_vocabulary(info: EngineInfo, checkpoint: Checkpoint, space: TokenSpace) -> None:
    """Raise CheckpointError unless the engine's model was made for this tokenizer, as far as it says."""
    if info.vocab_size < space.vocab_size:
        raise CheckpointError(
            f"the {info.backend} model has {info.vocab_size} ids, but {checkpoint.tokenizer_file} has ids up to "
            f"{space.vocab_size - 1}: they do not belong together"
        )
    if not info.tokenizer_sha256:
        return
    with checkpoint.tokenizer_file.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != info.tokenizer_sha256:
        raise CheckpointError(
            f"the {info.backend} model was converted with the tokenizer of sha256 {info.tokenizer_sha256[:12]}..., but "
            f"{checkpoint.tokenizer_file} has {found[:12]}...: it is of another checkpoint; name the one that belongs "
            "to the model with --codec FOLDER or --tokenizer FILE, or convert the model anew"
        )


def check_codebooks(codec: SpeechCodec, files: CodecFiles, space: TokenSpace) -> None:
    """Raise CheckpointError unless an exported codec has the codebooks of the tokenizer's families."""
    if isinstance(files, TorchCodecFiles):
        return  # its configuration was checked with the checkpoint
    for family, size in ((space.semantic, codec.semantic_cardinality), (space.glm, codec.glm_cardinality)):
        if size != family.size:
            raise CheckpointError(
                f"{files.folder}: the codec has {size} codes, but the tokenizer has {family.size} "
                f"`<|{family.name}_N|>` tokens: this codec does not belong to this model"
            )


def load_codec(checkpoint: Checkpoint, device: str = "cpu", threads: int | None = None) -> SpeechCodec:
    """The codec of a checkpoint on a torch device; nothing is read from disk until it is needed.

    threads: torch's, of the whole process; None leaves them alone.
    """
    return TorchCodecFiles(checkpoint.bicodec_dir, checkpoint.glm_dir).load(device, threads)


def open_model(
    model: str | Path,
    *,
    bicodec: Path | None = None,
    glm_tokenizer: Path | None = None,
    tokenizer: Path | None = None,
    require: Collection[Part] = PARTS,
) -> Checkpoint:
    """A checkpoint by folder, hub id, "demo" or "tiny-random"; the other arguments are those of Checkpoint.open."""
    return Checkpoint.open(
        resolve_model(str(model)), bicodec=bicodec, glm_tokenizer=glm_tokenizer, tokenizer=tokenizer, require=require
    )


def parts_of(tasks: Collection[Task]) -> set[Part]:
    """The parts of a checkpoint that these tasks read."""
    return {part for task in tasks for part in TASK_PARTS[task]}


def _tokenizer(folder: Path, home: Path) -> Path:
    """tokenizer.json beside the model, or else beside its codec."""
    own, other = folder / "tokenizer.json", home / "tokenizer.json"
    return other if other.is_file() and not own.is_file() else own
