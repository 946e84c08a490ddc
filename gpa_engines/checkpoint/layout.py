"""Where the parts of a checkpoint lie, which task needs which, and how to get one that is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpa_codecs.errors import CheckpointError

Part = Literal["lm", "tokenizer", "bicodec", "wav2vec2", "glm"]

PARTS: tuple[Part, ...] = ("lm", "tokenizer", "bicodec", "wav2vec2", "glm")

TASK_PARTS: Mapping[str, tuple[Part, ...]] = {
    "stt": PARTS,
    "tts-a": ("lm", "tokenizer", "bicodec"),
    "vc": ("lm", "tokenizer", "bicodec", "wav2vec2"),
}
"""Parts that each task reads. A voice is read without wav2vec2; only transcription uses the GLM tokenizer."""

PART_NAMES: Mapping[Part, str] = {
    "lm": "language model",
    "tokenizer": "text tokenizer",
    "bicodec": "BiCodec",
    "wav2vec2": "wav2vec2",
    "glm": "GLM tokenizer",
}

BICODEC = "BiCodec"
WAV2VEC2 = "wav2vec2-large-xlsr-53"
GLM = "glm-4-voice-tokenizer"

DOWNLOAD = "gpa-run --model AutoArk-AI/GPA downloads the whole checkpoint"

_OVERRIDES: Mapping[Part, str] = {
    "tokenizer": "--tokenizer FILE uses another one",
    "bicodec": "--bicodec FOLDER uses another one",
    "wav2vec2": "--bicodec FOLDER uses another BiCodec with its own wav2vec2",
    "glm": "--glm-tokenizer FOLDER uses another one",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of a checkpoint's parts; nothing but `root` needs to exist.

    root: folder of the language model. tokenizer_file: tokenizer.json. bicodec_dir, wav2vec2_dir, glm_dir: folders.
    """

    root: Path
    tokenizer_file: Path
    bicodec_dir: Path
    wav2vec2_dir: Path
    glm_dir: Path

    @classmethod
    def find(
        cls,
        path: str | Path,
        *,
        bicodec: str | Path | None = None,
        glm_tokenizer: str | Path | None = None,
        tokenizer: str | Path | None = None,
    ) -> Layout:
        """The layout of the checkpoint in `path`, with the folders (`tokenizer`: file or folder) that replace a part.

        Raises CheckpointError when `path` is no folder, or an empty one.
        """
        root = Path(path).expanduser()
        if not root.exists():
            raise CheckpointError(f"{root}: no such folder; expected a checkpoint ({DOWNLOAD})")
        if not root.is_dir():
            raise CheckpointError(f"{root} is a file; expected the folder of a checkpoint, with config.json in it")
        try:
            empty = not any(root.iterdir())
        except OSError as error:
            raise CheckpointError(f"{root}: {error.strerror or error}") from error
        if empty:
            raise CheckpointError(f"{root} is empty; expected a checkpoint ({DOWNLOAD})")
        tokenizer_file = Path(tokenizer).expanduser() if tokenizer else root / "tokenizer.json"
        bicodec_dir = Path(bicodec).expanduser() if bicodec else root / BICODEC
        return cls(
            root=root,
            tokenizer_file=tokenizer_file / "tokenizer.json" if tokenizer_file.is_dir() else tokenizer_file,
            bicodec_dir=bicodec_dir,
            wav2vec2_dir=bicodec_dir / WAV2VEC2,
            glm_dir=Path(glm_tokenizer).expanduser() if glm_tokenizer else root / GLM,
        )

    def folder(self, part: Part) -> Path:
        """The folder that holds a part."""
        folders: dict[Part, Path] = {
            "lm": self.root,
            "tokenizer": self.tokenizer_file.parent,
            "bicodec": self.bicodec_dir,
            "wav2vec2": self.wav2vec2_dir,
            "glm": self.glm_dir,
        }
        return folders[part]


def require_file(part: Part, path: Path, what: str) -> None:
    """Raise CheckpointError when `path` is not there, saying what it is and how to get it."""
    if path.is_file():
        return
    remedy = "; ".join(filter(None, (DOWNLOAD, _OVERRIDES.get(part))))
    folder = path.parent
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected the folder of the {PART_NAMES[part]} ({remedy})")
    if not folder.exists():
        raise CheckpointError(f"{folder} is missing: expected the folder of the {PART_NAMES[part]} ({remedy})")
    if path.exists():
        raise CheckpointError(f"{path} is not a file; expected {what} ({remedy})")
    raise CheckpointError(f"{path} is missing: expected {what} ({remedy})")
