"""Other formats of a model beside its checkpoint: GGUF files and ONNX exports, checked without a framework."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpa_codecs.errors import GpaError
from gpa_engines.backends.llama_cpp.gguf_file import gguf_files

if TYPE_CHECKING:
    from gpa_engines.checkpoint import Part

TASKS_BY_VOCABULARY = {"full": ("stt", "tts-a", "vc"), "speech": ("tts-a", "vc"), "text": ("stt",)}
"""Tasks that a GGUF file can serve, by its vocabulary."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted part of a model.

    path: relative to the model's folder. content: what it is, in words. size: bytes. parts: of the checkpoint that it
    stands for. tasks: that it stands for them in. problem: what is wrong with it, or "".
    """

    path: str
    content: str
    size: int
    parts: tuple[Part, ...]
    tasks: tuple[str, ...]
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"path": self.path, "content": self.content, "bytes": self.size, "problem": self.problem}


def find_conversions(root: Path) -> list[Conversion]:
    """Everything beside the checkpoint in `root` that a backend without torch could read, damaged or not."""
    return [*_gguf(root), *_onnx_lm(root), *_onnx_codec(root)]


def _gguf(root: Path) -> Iterator[Conversion]:
    from gpa_engines.backends.llama_cpp.gguf_model import GgufModel

    for path in gguf_files(root):
        name, size = path.relative_to(root).as_posix(), path.stat().st_size
        try:
            model = GgufModel.open(path)
        except GpaError as error:
            yield Conversion(name, "GGUF", size, (), (), str(error))
            continue
        content = f"GGUF, {model.file_type}, {model.gpa.vocab} vocabulary"
        table = model.embeddings_path
        if table is not None and not table.is_file():
            problem = f"{table.name}, the embedding table that it reads prompts from, is not beside it"
            yield Conversion(name, content, size, (), (), problem)
            continue
        yield Conversion(name, content, size, ("lm",), TASKS_BY_VOCABULARY[model.gpa.vocab])


def _onnx_lm(root: Path) -> Iterator[Conversion]:
    from gpa_engines.backends.onnx.exported import ExportedLM

    for folder in (root / "lm", root / "onnx" / "lm"):
        if (folder / "manifest.json").is_file():
            try:
                found = ExportedLM.open(folder.parent)
            except GpaError as error:
                yield _damaged(folder, root, "ONNX language model", error)
            else:
                content = f"ONNX language model, {found.dtype}"
                yield Conversion(_name(folder, root), content, _size(folder), ("lm",), ("stt", "tts-a", "vc"))


def _onnx_codec(root: Path) -> Iterator[Conversion]:
    for folder in (root / "codec", root / "onnx" / "codec"):
        if (folder / "manifest.json").is_file():
            from gpa_codecs.onnx_folder import CodecFolder

            try:
                found = CodecFolder.open(folder)
            except GpaError as error:
                yield _damaged(folder, root, "ONNX codec", error)
            else:
                content = f"ONNX codec, decoder in {', '.join(found.parts['decoder'])}"
                parts: tuple[Part, ...] = ("bicodec", "wav2vec2", "glm")
                yield Conversion(_name(folder, root), content, _size(folder), parts, ("stt", "tts-a", "vc"))


def _damaged(folder: Path, root: Path, content: str, error: GpaError) -> Conversion:
    return Conversion(_name(folder, root), content, _size(folder), (), (), str(error))


def _name(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
